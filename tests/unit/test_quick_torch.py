"""The compiler stays out of a start, and is there, whole, when somebody asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.harness import REPOSITORY, environment

BEFORE = "import sys, torch\nfrom gai_yolo.distributed import quick_torch\nquick_torch.install()\n"
LOADED = "assert 'torch._dynamo.symbolic_convert' in sys.modules and 'sympy' in sys.modules\n"
NOT_LOADED = "assert 'torch._dynamo.symbolic_convert' not in sys.modules and 'sympy' not in sys.modules\n"
TRAIN = """
from torch.nn.parallel import DistributedDataParallel
from gai_yolo.distributed.world import fix_arithmetic
fix_arithmetic()
layer = torch.nn.Linear(3, 3)
optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
parallel = DistributedDataParallel(layer)
before = layer.weight.clone()
parallel(torch.ones(2, 3)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
dist.destroy_process_group()
assert not torch.equal(before, layer.weight)
from torchvision.ops import batched_nms
assert batched_nms(torch.tensor([[0., 0., 1., 1.]]), torch.ones(1), torch.zeros(1), 0.5).tolist() == [0]
"""
USES = {
    "by attribute": "assert torch._dynamo.config.optimize_ddp in (True, 'ddp_optimizer')\n",
    "by a module's name": "from torch._dynamo.exc import Unsupported\nassert Unsupported is torch._dynamo.exc.Unsupported\n",
    "by a name that the stand-in lacks": "from torch._dynamo.utils import counters\nassert counters is torch._dynamo.utils.counters\n",
    "by compiling": "assert torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item() == 2\n",
}


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_step_and_an_evaluation_do_without_the_compiler() -> None:
    """Loss: seconds before the first step, after every crash, for something that is not used."""
    run(BEFORE + TRAIN + NOT_LOADED)


@pytest.mark.parametrize("use", USES)
def test_who_asks_for_the_compiler_gets_the_real_one(use: str) -> None:
    """Loss: a stand-in that half of PyTorch takes for the compiler."""
    run(BEFORE + "layer = torch.nn.Linear(1, 1)\ntorch.optim.SGD(layer.parameters(), lr=0.1).step()\n" + NOT_LOADED + USES[use] + LOADED)


def test_a_compiler_that_is_loaded_already_stays() -> None:
    """Loss: two compilers in one process."""
    run("import torch._dynamo\nreal = torch._dynamo\n" + BEFORE + "assert torch._dynamo is real is sys.modules['torch._dynamo']\n")
