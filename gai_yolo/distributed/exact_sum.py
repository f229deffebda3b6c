"""Sums that do not depend on who adds up what in which order.

Floating-point addition is not associative, so a sum over micro-batches and ranks would change in its last bits with every
resize, and training makes much of a last bit. Here each summand is cut to a multiple of one quantum that all ranks know
beforehand; multiples are added as int64, which is exact, so any order and grouping gives the same bits (Hallberg and
Adcroft 2014, "An order-invariant real-to-integer conversion sum", Parallel Computing 40). What cannot be represented is
flagged, and the flags are added up like everything else: all ranks see them in the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

HEADROOM_BITS = 20
"""A micro-batch's gradient may be this many powers of two above what is expected."""
FALL_BITS = 4
"""The first gradient of a parameter may be this many powers of two below what is expected, and still has more bits than in float32."""
SUM_BITS = 62
"""Magnitude of a sum over all micro-batches, in powers of two; int64 has 63."""
COARSE_BITS, FINE_BITS = 20, 40
"""Of the two words of an `ExactSum`: quanta 2^-20 and 2^-60."""
NO_EXPONENT = -(2**15)
"""Exponent of a gradient that is zero, or of which nothing is known."""


class ExactSum:
    """The order-invariant sum of rows of numbers, in two int64 words each: exact to 2^-60 a summand.

    For the few numbers of a step: losses, BatchNorm's statistics, and counts that all ranks are to know.

    Args:
        size: numbers in a row.
        num_counts: whole numbers beside them.
        num_rows: that will be added at most, over all ranks; up to 2^22. Magnitudes must be below 2^42 over the next power of two.
    """

    def __init__(self, size: int, num_counts: int, num_rows: int, device: torch.device) -> None:
        # One more word counts the rows that could not be represented.
        self._words = torch.zeros(2 * size + 1 + num_counts, dtype=torch.int64, device=device)
        self._size = size
        bits = (num_rows - 1).bit_length()
        assert bits + FINE_BITS <= SUM_BITS
        self._limit = 2.0 ** (SUM_BITS - COARSE_BITS - bits)

    def add(self, row: Tensor) -> None:
        """Add a row `(size,)`; float32 and float64 alike."""
        row = row.double()
        bad = ~(row.abs() < self._limit)
        scaled = row.masked_fill(bad, 0.0) * 2.0**COARSE_BITS
        coarse = scaled.trunc()
        fine = (scaled - coarse) * 2.0**FINE_BITS
        self._words[: 2 * self._size + 1] += torch.cat((coarse, fine, bad.any()[None])).to(torch.int64)

    def count(self, counts: Tensor) -> None:
        """Add to the counts `(num_counts,)`."""
        self._words[2 * self._size + 1 :] += counts

    def reduce(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Add up the rows and counts of all ranks; to be called by all."""
        sum_over_ranks(self._words)

    @property
    def is_finite(self) -> bool:
        """Whether every summand so far was a number, and below the limit."""
        return not bool(self._words[2 * self._size])

    @property
    def counts(self) -> list[int]:
        """The counts so far."""
        counts: list[int] = on_host(self._words[2 * self._size + 1 :]).tolist()
        return counts

    def result(self) -> Tensor:
        """The sums `(size,)`, float64."""
        coarse, fine = torch.split(self._words[: 2 * self._size].double(), self._size)
        return coarse * 2.0**-COARSE_BITS + fine * 2.0 ** -(COARSE_BITS + FINE_BITS)


class GradientSum:
    """The order-invariant sum of a step's gradients over micro-batches and ranks, one int64 word an element.

    Every parameter has its own quantum: so small that an element 2^20 times above what is expected just fits, which leaves some 30
    bits below the root mean square of the gradient's elements, where float32 has 24 (but not below 2^-100). What is expected
    is said by exponents, which are the same on all ranks and part of the training state.

    In a step: `begin`; after each backward pass `take`, but for the last one on several ranks, whose gradients pass through
    `hook`; then `finish`. Memory: for each element a float32, an int64 if it is sent, and two int64 and a float32 more if a rank has
    several micro-batches.

    Args:
        parameters: dense.
        world_size: with one rank, nothing is sent.
    """

    def __init__(self, parameters: Sequence[Tensor], world_size: int) -> None:
        self._parameters, self._world_size = list(parameters), world_size
        self._number = {id(parameter): number for number, parameter in enumerate(parameters)}
        self._sizes, device = [p.numel() for p in parameters], parameters[0].device
        # Kept from step to step, because fresh memory of this size costs a CPU more than what is computed in it.
        self._sums, self._whole, self._flat = torch.empty(0), torch.empty(0), torch.empty(0)
        self._words: dict[int, Tensor] = {}  # for each bucket; DDP cuts them anew once
        # Not the views of DDP's buckets: kernels may sum in another order where memory is aligned in another way, and how
        # buckets are cut depends on the number of ranks.
        self._gradients = [torch.empty_like(parameter) for parameter in parameters]
        self._factors: list[float] = []
        self._limit = 0.0
        self.above = torch.zeros(1, dtype=torch.bool, device=device)
        """`(1,)`: whether an element that this rank has added in this step was not below what was expected, or no number."""
        self._taken, self._hook_counts = 0, True
        self._sent: list[tuple[dist.Work, Tensor, list[int]]] = []  # buckets on their way, and their parameters in the order of the bucket

    def begin(self, exponents: Sequence[int], num_micro_batches: int, loss_scale: float = 1.0) -> None:
        """Begin a step, or begin it anew.

        Args:
            exponents: for each parameter e, with every element of its gradient expected below 2^(e + `HEADROOM_BITS`); a parameter
                of which `NO_EXPONENT` is known is expected to be at most as large as the others.
            num_micro_batches: of the step, over all ranks.
            loss_scale: a power of two by which gradients are too large.
        """
        bits = SUM_BITS - (num_micro_batches - 1).bit_length()
        # Powers of two that float32 can hold; multiplying by them is exact.
        self._factors = [2.0 ** max(-100, min(100, bits - HEADROOM_BITS - exponent)) / loss_scale for exponent in expected(exponents)]
        self._limit = 2.0**bits
        self.above = torch.zeros_like(self.above)
        self._taken, self._hook_counts = 0, True
        self._sent = []

    def take(self) -> None:
        """Add the gradients of the parameters, which are left without."""
        gradients = []
        for parameter in self._parameters:
            assert parameter.grad is not None
            gradients.append(memory_order(parameter.grad))
            parameter.grad = None
        if not len(self._sums):
            self._flat = torch.empty(sum(self._sizes), device=gradients[0].device)
            self._sums, self._whole = (torch.empty_like(self._flat, dtype=torch.int64) for _ in range(2))
        torch.cat(gradients, out=self._flat)
        self._scale(self._flat, range(len(gradients)))
        if self._taken:
            self._whole.copy_(self._flat)
            self._sums += self._whole
        else:
            self._sums.copy_(self._flat)
        self._taken += 1

    def ignore_next(self) -> None:
        """The gradients that come to `hook` in this step are those of a blank image: only what was taken before counts."""
        self._hook_counts = False

    def hook(self, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """DDP's communication hook, called in backward when a bucket of gradients is complete, and only then.

        The bucket must hold the gradients of this rank's last micro-batch alone. DDP is told that it is done at once; what
        is under way is waited for by `finish`, in the main thread, which has the configured number of threads.
        """
        flat = bucket.buffer()
        numbers = [self._number[id(parameter)] for parameter in bucket.parameters()]
        words = self._words.get(bucket.index())
        if words is None or len(words) != len(flat):
            words = self._words[bucket.index()] = torch.empty_like(flat, dtype=torch.int64)
        if self._hook_counts:
            self._scale(flat, numbers)
            words.copy_(flat)
        else:
            words.zero_()
        if self._taken:
            sums = torch.split(self._sums, self._sizes)
            parts = torch.split(words, [self._sizes[number] for number in numbers])
            torch._foreach_add_(list(parts), [sums[number] for number in numbers])
        work = dist.all_reduce(words, async_op=True)
        assert work is not None
        self._sent.append((work, words, numbers))
        done: Future[Tensor] = Future()
        done.set_result(flat)
        return done

    def finish(self) -> None:
        """End the step: the gradients of the parameters are the sums; worthless if `above` holds on any rank."""
        if self._world_size == 1:
            self._decode(self._sums, range(len(self._sizes)))
        for work, words, numbers in self._sent:
            work.wait()
            self._decode(words, numbers)
        self._sent = []
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def _scale(self, flat: Tensor, numbers: Sequence[int]) -> None:
        """Express gradients one behind the other, in place, as multiples of their quanta. What is cut off when they are
        made whole numbers is less than one."""
        parts = list(torch.split(flat, [self._sizes[number] for number in numbers]))
        torch._foreach_mul_(parts, [self._factors[number] for number in numbers])
        low, high = torch.aminmax(flat)  # no numbers where there is one that is none
        self.above |= ~((low > -self._limit) & (high < self._limit))

    def _decode(self, words: Tensor, numbers: Sequence[int]) -> None:
        gradients = [memory_order(self._gradients[number]) for number in numbers]
        torch._foreach_copy_(gradients, list(torch.split(words, [self._sizes[number] for number in numbers])))
        torch._foreach_mul_(gradients, [1 / self._factors[number] for number in numbers])


def exponents_of(magnitudes: Tensor) -> list[int]:
    """For each of `(P,)` float32 magnitudes the least e with magnitude < 2^e; 0 and what is not finite give `NO_EXPONENT`."""
    known = magnitudes.isfinite() & (magnitudes > 0)
    exponents = torch.frexp(magnitudes)[1]
    result: list[int] = on_host(exponents.masked_fill(~known, NO_EXPONENT)).tolist()
    return result


def expected(exponents: Sequence[int]) -> list[int]:
    """Exponents with the largest one in place of `NO_EXPONENT`."""
    most = max(exponents)
    return [most if exponent == NO_EXPONENT else exponent for exponent in exponents] if most != NO_EXPONENT else [0] * len(exponents)


def is_too_coarse(exponents: Sequence[int], norms: Sequence[int]) -> bool:
    """Whether a parameter of which nothing was known has got its first gradient (exponent of its norm in `norms`), and one so small that
    float32 would sum it with more bits."""
    pairs = zip(exponents, expected(exponents), norms, strict=True)
    return any(known == NO_EXPONENT and norm != NO_EXPONENT and norm < limit - FALL_BITS for known, limit, norm in pairs)


def followed(exponents: Sequence[int] | None, given: Sequence[int]) -> list[int] | None:
    """What to expect after the optimizer was given gradients with norms of these exponents: up at once, down by one a step.

    Momentum falls by less a step, so that a gradient far below what is expected, whose bits are few, is added to something
    that float32 holds with a coarser quantum still.

    Args:
        exponents: what was expected before; None at the beginning.

    Returns:
        None while nothing is known of any parameter.
    """
    if exponents is None:
        return None if set(given) <= {NO_EXPONENT} else list(given)
    return [old if new == NO_EXPONENT else max(new, old - 1) for old, new in zip(exponents, given, strict=True)]


def on_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory, once the GPU has come so far. It is pinned: while the driver copies into other memory it keeps all other
    threads from the GPU, and behind a collective whose peer is gone that is for ever, also for who saves the state."""
    if not tensor.is_cuda:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return copy


def memory_order(tensor: Tensor) -> Tensor:
    """A view `(N,)` of a dense tensor in the order of its memory, whatever its memory format."""
    return tensor.as_strided((tensor.numel(),), (1,))
