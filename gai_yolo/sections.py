"""What a YAML file may say: typed sections, a doc under every field.

Fields marked `FIXED` define the run: a run that already has checkpoints is not continued with another value, because the result
would be neither the old run nor the new one. Those marked `LOCAL` are a machine's own affair; in all others the nodes of a job must be
alike, which they compare at every start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FIXED: dict[str, Any] = {"continuation": "fixed"}
LOCAL: dict[str, Any] = {"scope": "machine"}

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=False)


class ExperimentConfig(Section):
    name: str = Field(default="shapes", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is `<folder>/<name>`. Letters, digits, `.`, `_` and `-`."""
    folder: Path = Field(default=Path("experiments"), json_schema_extra=LOCAL)
    """Where run folders live, relative to the current directory."""
    seed: int = Field(default=0, ge=0, lt=2**32, json_schema_extra=FIXED)
    """Every random draw of the run follows from it."""


class ModelConfig(Section):
    size: Literal["n", "s", "m", "l", "x", "debug"] = Field(default="n", json_schema_extra=FIXED)
    """Size of YOLO12, from 2.6 M (n) to 59 M parameters (x); `debug` is for tests and learns nothing."""
    weights: Path | None = Field(default=None, json_schema_extra=LOCAL)
    """Weights to start from: a state dict, safetensors, a checkpoint of this program, or a released YOLO12 with its pickled network, which
    is read without its program. Of another number of classes the class branch is left out, and told."""
    freeze: Annotated[int, Field(ge=0, le=22)] | list[str] = 0
    """Layers that are not trained: the first so many of 22, or patterns of parameters' names such as `[model.0, "model.*.cv1"]`. Their
    BatchNorms keep their statistics."""
    freeze_epochs: int | None = Field(default=None, ge=0)
    """`freeze` holds for so many first epochs; `null`: for the whole run."""


class SplitConfig(Section):
    annotations: Path | None = Field(default=None, json_schema_extra=LOCAL)
    """COCO json, or a list of VOC names, of this split, relative to `data.path`; found by itself where the layout is usual."""
    images: Path | None = Field(default=None, json_schema_extra=LOCAL)
    """Image folder of this split, relative to `data.path`; found by itself where the layout is usual."""


class DataConfig(Section):
    path: Path = Field(default=Path("shapes"), json_schema_extra=LOCAL)
    """`shapes` (built in), a data set folder, or a YOLO `data.yaml`; relative to the current directory."""
    format: Literal["auto", "coco", "yolo", "voc"] = "auto"
    """How the annotations are written; `auto` takes what is there (COCO before YOLO before VOC)."""
    train: SplitConfig = SplitConfig()
    """Where the training split lies, if not in a usual place."""
    val: SplitConfig = SplitConfig()
    """Where the validation split lies, if not in a usual place."""
    max_bad_fraction: Fraction = 0.1
    """Share of missing or unreadable images that is skipped and counted; beyond it the data set is refused. Before a training begins up to
    100 images of a split are decoded, and held to it as well."""
    image_size: int = Field(default=640, ge=64, le=4096, multiple_of=32, json_schema_extra=FIXED)
    """Side of the square network input, in pixels; a multiple of 32, at least 64."""
    workers: int = Field(default=2, ge=0, le=256, json_schema_extra=LOCAL)
    """Loader processes for each training process; 0 loads in the training process itself."""
    cache: Literal["none", "ram", "disk"] = Field(default="none", json_schema_extra=LOCAL)
    """Keep decoded, resized images in memory or under `cache_folder`."""
    cache_folder: Path = Field(default=Path("~/.cache/gai-yolo"), json_schema_extra=LOCAL)
    """Where the built-in data set and cached images are kept."""


class AugmentConfig(Section):
    mosaic: Fraction = 1.0
    """Probability that a sample is a mosaic of four images."""
    mixup: Fraction = 0.0
    """Probability that two samples are blended (only while mosaic is on)."""
    scale: float = Field(default=0.5, ge=0.0, lt=1.0)
    """Random zoom, drawn from 1 - scale to 1 + scale."""
    translate: float = Field(default=0.1, ge=0.0, le=0.5)
    """Random shift, as a fraction of the image side, to either side."""
    hsv_h: Fraction = 0.015
    """Random hue shift, as a fraction of the colour circle."""
    hsv_s: Fraction = 0.7
    """Random change of the saturation, as a fraction."""
    hsv_v: Fraction = 0.4
    """Random change of the brightness, as a fraction."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    flip_vertical: Fraction = 0.0
    """Probability of a vertical flip; for images without an up and down, such as microscopy."""
    close_mosaic: int = Field(default=10, ge=0)
    """Mosaic and mixup are off for this many last epochs."""
    multi_scale: float = Field(default=0.0, ge=0.0, le=0.75)
    """Each step has images of another side, a multiple of 32 drawn from (1 - multi_scale) to (1 + multi_scale) x `data.image_size`."""


class LossConfig(Section):
    box: NonNegative = 7.5
    """Gain of the CIoU term."""
    cls: NonNegative = 0.5
    """Gain of the classification term."""
    dfl: NonNegative = 1.5
    """Gain of the distribution focal term."""
    class_weights: dict[str, Positive] | Literal["auto"] | None = None
    """Weights of classes in the classification term, by name; those that are not named have 1. `auto`: by the root of how seldom a class
    is, with a mean of 1 over the boxes."""


class TrainingConfig(Section):
    epochs: int = Field(default=600, ge=1)
    """Passes over the training set."""
    patience: int | None = Field(default=None, ge=1)
    """Training ends when mAP50-95 has not risen for so many epochs; `null`: only after the last one."""
    time_budget: Positive | None = None
    """Hours, of steps and evaluations over all starts, without downtime: training ends, evaluated and saved, after the last epoch that
    fits, but not before the first. The learning rate falls over `epochs` all the same."""
    image_weights: Fraction = 0.0
    """Images of classes that occur in less than this fraction of the images are drawn more often, others less, by the root of how seldom
    (repeat factors, Gupta et al. 2019); 0: each image once an epoch."""
    batch_size: int = Field(default=64, ge=1, le=2**22, json_schema_extra=FIXED)
    """Global batch of one optimizer step, whatever the number of processes."""
    micro_batch_size: int | Literal["auto"] = Field(default="auto", json_schema_extra=FIXED)
    """Images of one forward pass; `auto` is batch_size over the larger of the first start's processes and
    `elastic.max_world_size`, and then stays."""
    max_batches_per_epoch: int | None = Field(default=None, ge=1, json_schema_extra=FIXED)
    """End each epoch after this many steps; for trying things out."""
    optimizer: Literal["auto", "sgd", "adamw"] = Field(default="auto", json_schema_extra=FIXED)
    """`auto`: AdamW for runs of fewer than 10,000 iterations, else SGD."""
    lr: Positive | Literal["auto"] = "auto"
    """Peak learning rate; `auto`: 0.01 for SGD, 0.002 x 5 / (4 + classes) for AdamW."""
    final_lr_fraction: Fraction = 0.01
    """The learning rate at the end, as a fraction of `lr`."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the learning rate falls from `lr` to `lr x final_lr_fraction`."""
    momentum: float | Literal["auto"] = "auto"
    """SGD's Nesterov momentum or AdamW's beta1; `auto`: 0.937 for SGD, 0.9 for AdamW."""
    weight_decay: NonNegative = 0.0005
    """At batch 64; scaled with the batch. Not on biases and norms."""
    warmup_epochs: NonNegative = 3.0
    """The learning rate rises from 0 over this many epochs, or `warmup_iterations` if that is longer."""
    warmup_iterations: int = Field(default=100, ge=0)
    """Least length of the warm-up, in steps."""
    warmup_momentum: float = Field(default=0.8, ge=0.0, lt=1.0)
    """Momentum at the first step; rises to `momentum` over the warm-up."""
    clip_norm: Positive = 10.0
    """The gradient's norm is clipped to this."""
    max_bad_steps: int = Field(default=10, ge=0)
    """A step whose loss or gradient is not finite is passed over and counted. After more than this many in a row the run goes back
    to its last good checkpoint; the third time it stops."""
    ema_decay: float = Field(default=0.9999, ge=0.0, lt=1.0)
    """Decay of the weights' moving average, which is what is evaluated."""
    ema_tau: Positive = 2000.0
    """The decay is ema_decay x (1 - exp(-updates / ema_tau))."""
    amp: Literal["none", "bf16", "fp16"] = "none"
    """Mixed precision: bf16 on CPU and GPU, fp16 (with loss scaling) on GPU only."""
    channels_last: bool = True
    """Memory format of images and weights; faster on most machines."""
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", json_schema_extra=LOCAL)
    """`auto` takes the GPU of this process where there is one. All processes compute on the same kind of device, or none does."""
    threads: int | Literal["auto"] = Field(default="auto", json_schema_extra=FIXED)
    """Threads for each process. On a CPU the bits of a result depend on it: `auto` shares the cores that the first start's machine,
    or its container, may use among its processes (of several machines, that with the fewest for each), and then stays."""
    exact: bool = Field(default=True, json_schema_extra=FIXED)
    """Sums over micro-batches and processes that do not depend on their order, and deterministic kernels: no bit of the result depends
    on the number of processes or on interruptions. `false`: plain DDP averaging."""
    checkpoint_interval: int = Field(default=1, ge=1)
    """Write `epoch_XXX.pt` every this many epochs (and always at the last)."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if isinstance(self.micro_batch_size, int) and not 1 <= self.micro_batch_size <= self.batch_size:
            raise ValueError(f"micro_batch_size must lie between 1 and batch_size ({self.batch_size})")
        if isinstance(self.momentum, float) and not 0.0 <= self.momentum < 1.0:
            raise ValueError("momentum must lie in [0, 1)")
        if isinstance(self.threads, int) and self.threads < 1:
            raise ValueError("threads must be at least 1")
        return self


class SnapshotsConfig(Section):
    interval_steps: int | None = Field(default=None, ge=1)
    """Save in the middle of an epoch every this many steps, whatever `interval_seconds` says."""
    interval_seconds: Positive | Literal["auto"] | None = "auto"
    """Save in the middle of an epoch every this many seconds, or never (`null`). `auto`: the interval that loses least time, from the
    measured cost of a snapshot and `hours_between_failures` (Young and Daly)."""
    hours_between_failures: Positive = 3.0
    """Expected time between interruptions, for `auto`; a few hours on spot machines."""
    max_overhead: float = Field(default=0.01, gt=0.0, le=1.0)
    """`auto` takes so long an interval that snapshots slow training down by at most this fraction."""
    keep: int = Field(default=2, ge=1)
    """Newest mid-epoch snapshots that are kept."""
    keep_epochs: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    """Newest epoch checkpoints that are kept. The last and the best one always are."""
    keep_every: int | None = Field(default=None, ge=1)
    """With a number in `keep_epochs`: every this many epochs the checkpoint is kept for ever."""
    patience_seconds: NonNegative = 600.0
    """How long the end of training waits for a disk that takes nothing of the last checkpoint."""


class ElasticConfig(Section):
    max_world_size: int | None = Field(default=None, ge=1)
    """Most processes that the run will ever have; `training.micro_batch_size: auto` leaves work for so many."""
    check_interval: int = Field(default=100, ge=1)
    """Steps between two comparisons of the state of all processes; it is also compared before each save. A difference (a broken GPU, a
    bug) stops the job."""
    memory_interval_steps: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    """Each node keeps the newest state in memory, renewed every this many steps, so that a crashed process costs no more than these.
    `auto`: as often as `snapshots.max_overhead` allows; `null`: never."""
    memory_folder: Path = Field(default=Path("/dev/shm"), json_schema_extra=LOCAL)
    """Memory-backed storage of a node. What is there goes with the node, and survives its processes."""
    notices: Literal["auto", "aws", "gcp", "azure", "none"] = Field(default="auto", json_schema_extra=LOCAL)
    """Whose metadata service announces that a spot machine goes away; `auto` asks the cloud that the machine's firmware
    (`/sys/class/dmi/id`) names, or nobody."""
    notices_endpoint: str | None = Field(default=None, pattern=r"^https?://\S+$", json_schema_extra=LOCAL)
    """Address of the metadata service in place of the cloud's own, such as `http://10.0.0.1:8080`; it is asked whatever the
    firmware says."""
    grace_seconds: float = Field(default=15.0, ge=2.0, json_schema_extra=LOCAL)
    """Time between a notice and the end of the machine: the state is saved and the process gone well within it."""
    step_timeout_seconds: Positive = 60.0
    """A step, or an evaluation's batch, that takes longer than this and 10 times the median hangs: the process says where, saves its state
    and ends, to be started again."""
    timeout_seconds: Positive = 300.0
    """How long processes wait for one that gives no sign of life. Reading data, evaluating and waiting for a disk may take any time; a
    process that has done nothing at all there for so long, and five times `step_timeout_seconds`, is ended, to be started again."""


class EvaluationConfig(Section):
    interval: int = Field(default=1, ge=1)
    """Evaluate every this many epochs (and always after the last)."""
    batch_size: int = Field(default=32, ge=1)
    """Images of one forward pass; batches are shared out whole, so the numbers do not depend on the processes."""
    confidence: Fraction = 0.001
    """Detections below this score are dropped."""
    iou: Fraction = 0.7
    """Class-wise non-maximum suppression threshold."""
    max_detections: int = Field(default=300, ge=1)
    """Detections kept for one image."""


class ReportingConfig(Section):
    tensorboard: bool = True
    """Write TensorBoard files into the run folder."""
    images: int = Field(default=8, ge=0)
    """Validation images drawn with ground truth and predictions at each evaluation; with 0 no pictures of the run are drawn at all."""
    log_interval: int = Field(default=10, ge=1)
    """Steps between two plain lines when the output is not a terminal."""
    ledger: bool = False
    """Write the ids of the samples of every step to `ledger/rank_<r>.jsonl` in the run folder, for audits."""
