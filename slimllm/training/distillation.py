"""Distillation of a pruned model from the dense one it came from, on a few hundred samples of text (not from the paper).

The loss is the KL divergence of the dense model's next-token distribution from the pruned one's, in nats per token. The dense
model runs once, beforehand, and only its last states are kept; its distributions follow from them and from the output head, which
both models share. So the two are never in memory together, and no logits are kept.

Several processes each take their share of the samples. Where all weights are trained, each holds its share of them too (sharding.py).
"""

from __future__ import annotations

import copy
import gc
import logging
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import nn

from ..errors import UserError
from ..models.adapter import LayerAdapter
from ..models.shape import ModelShape, shape_of
from ..models.skeleton import in_float32
from ..models.tensor_file import TensorFile
from ..plan import LayerPlan, removed_parameters
from ..run import Run
from ..streaming.divergence import Divergence
from ..streaming.journal import Journal, resuming
from ..streaming.progress import Progress
from ..streaming.sizes import Sizes
from ..utils import processes
from ..utils.files import atomic_file
from ..utils.memory import free_memory, return_free_memory
from . import sharding
from .teacher import Teacher

log = logging.getLogger("slimllm")

BATCH_SAMPLES = 8  # per optimizer step
BATCH_TOKENS = 512  # that one forward pass takes at a time
HELD_OUT = 16  # samples that are not trained on: whether training helped is measured on them
LOSS_ROWS = 256  # whose logits are held at a time
SCALES_RATE, ALL_RATE = 3e-3, 0.0026
WARMUP = 0.1  # share of the steps in which the learning rate rises; then it falls, as a cosine, to zero
LINES = 8  # that the log gets while training
QUICK, SELDOM = 1.0, 10  # a step that takes longer than so many seconds to keep is kept where so many times as long went by since the last


@dataclass
class Distillation:
    """How a distillation went. ``before`` and ``after``: the divergence, in nats per token, on ``held_out`` samples that were not
    trained on. ``kept``: whether it fell; where it did not, the model is as it was.
    """

    mode: str
    samples: int
    held_out: int
    epochs: int
    learning_rate: float
    steps: int
    trained: int
    before: float
    after: float | None
    kept: bool


def distil(run: Run, student, teacher: Teacher, saved: torch.dtype | None = None) -> Distillation:
    """Trains ``student``, a pruned model in memory, in place, as the settings of ``run`` say.

    ``distill`` "all": every weight of the decoder; "scales": its biases and norms, and a factor for each input column of the output
    projections, which is folded into their weights at the end. Neither adds parameters. The last HELD_OUT samples (at most a quarter) are
    not trained on. ``saved``: the dtype that it will be saved in, by default its own: what was trained is rounded to it before it is
    measured. Where a run was stopped, it continues from the last step that was stored.

    Of several processes that train every weight, each holds its share of the weights that are trained; the student stays where it is.

    Where the divergence does not fall, the student is left as it was, and the log says so; it is so too where anything raises.
    Raises UserError for fewer than two samples.
    """
    if teacher.total < 2:
        raise UserError("distillation: one sample is too few, since some are held out; raise --distill_examples")
    config, mode = run.config, run.config.distill
    held_out = min(HELD_OUT, teacher.total // 4) or 1
    numbers = torch.arange(teacher.total)
    train, rest = numbers[:-held_out], numbers[-held_out:]
    epochs = range(config.distill_epochs)
    batches = [part for epoch in epochs for part in _shuffled(train, config.seed + epoch).split(BATCH_SAMPLES)]
    way = _distil_sharded if mode == "all" and processes.count() > 1 else _distil_whole
    (before, rate, trained), after = way(run, student, teacher, batches, rest, saved or student.dtype)
    gc.collect()  # the modules of a sharded model refer to each other
    return_free_memory()
    kept = after < before
    log.info("distillation: divergence on held-out samples %.4f -> %.4f nats per token", before, after)
    if not kept:
        log.warning("distillation: the divergence did not fall, so the pruned model stays as it was; lower --distill_learning_rate")
    after = after if math.isfinite(after) else None  # JSON knows no NaN
    return Distillation(mode, len(train), held_out, len(epochs), rate, len(batches), trained, before, after, kept)


def _distil_whole(run: Run, student, teacher: Teacher, batches: list, rest: torch.Tensor, saved: torch.dtype) -> tuple[tuple, float]:
    """Trains the student itself. Returns what the training was (:func:`_train`), and the divergence after it."""
    home, mode = next(student.parameters()).device, run.config.distill
    names = trained_names(student, mode)
    student.to(teacher.device)
    start = {name: student.get_parameter(name).detach().clone() for name in names}
    with _as_before(student, start, home), _trainable(student, mode, teacher.dtype) as parameters:
        training = _train(run, parameters, _Loss(student, teacher), batches, rest)
    for name, dtypes in _roundings(student, names, saved).items():
        parameter = student.get_parameter(name)
        parameter.data = _rounded(parameter.data, dtypes)
    with _as_before(student, start, home), _trainable(student, mode, teacher.dtype):
        after = _Loss(student, teacher).mean(rest)
    if not after < training[0]:
        _put_back(student, start)
    student.to(home)
    return training, after


def _distil_sharded(run: Run, student, teacher: Teacher, batches: list, rest: torch.Tensor, saved: torch.dtype) -> tuple[tuple, float]:
    """Trains a copy of the student that is shared out over the processes; what comes of it is put into the student at the end."""
    names = trained_names(student, run.config.distill)
    offload = _offloads(student, teacher.device, teacher.dtype)
    with processes.in_step():
        model = sharding.sharded(student, names, teacher.device, teacher.dtype, offload)
        parameters, loss = [model.get_parameter(name) for name in names], _Loss(model, teacher, True)
        training = _train(run, parameters, loss, batches, rest)
        for parameter, dtypes in zip(parameters, _roundings(student, names, saved).values(), strict=True):
            sharding.own(parameter.data).copy_(_rounded(sharding.own(parameter.data), dtypes))
        after = loss.mean(rest)
        if after < training[0]:
            for name, parameter in zip(names, parameters):
                student.get_parameter(name).data.copy_(sharding.whole(parameter.data))
    return training, after


def _roundings(student, names: list[str], saved: torch.dtype) -> dict[str, tuple[torch.dtype, ...]]:
    """The dtypes that each parameter is rounded to after the training: its own, and that in which it is saved."""
    exact = in_float32(student.config, saved)
    own = {name: student.get_parameter(name).dtype for name in names}
    return {name: (dtype,) if name in exact else (dtype, saved, dtype) for name, dtype in own.items()}


def _rounded(values: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    for dtype in dtypes:
        values = values.to(dtype)
    return values


def _train(run: Run, parameters: list[nn.Parameter], loss: _Loss, batches: list, rest: torch.Tensor) -> tuple[float, float, int]:
    """Trains the parameters. Returns the divergence on the samples ``rest`` before it, the peak learning rate and how many were trained."""
    training = _Training(parameters, run.layer_journal, len(batches))
    if not training.resumed():
        training.before = loss.mean(rest)
        training.rate = run.config.distill_learning_rate or _default_rate(run.config.distill, parameters, training.before)
    training.run(loss, batches, run.progress)
    return training.before, training.rate, sum(parameter.numel() for parameter in parameters)


class _Training:
    """The optimizer of a distillation, and the steps that it takes; it continues from the last step that a stopped one stored.

    ``before``: the divergence before the first step. ``rate``: the learning rate at its peak.
    """

    FILE = "distilling.safetensors"
    MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter
    ABOUT = "about"  # the step, the divergence before the first and the rate

    def __init__(self, parameters: list[nn.Parameter], journal: Journal | None, steps: int):
        self.parameters, self.steps, self.step = parameters, steps, 0
        self.before, self.rate = math.nan, 0.0
        self._path = journal and journal.folder / self.FILE
        self._optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def resumed(self) -> bool:
        """Whether a stopped run stored a step; if so, restores it."""
        if self._path is None or not self._path.is_file():
            return False
        with resuming(self._path), safe_open(self._path, "pt") as file:
            step, self.before, self.rate = file.get_tensor(self.ABOUT).tolist()
            for parameter in self.parameters:
                moments = {name: torch.zeros_like(parameter.data) for name in self.MOMENTS}
                self._optimizer.state[parameter] = {"step": torch.tensor(step), **moments}
            for name, tensor in self._tensors().items():
                if len(values := sharding.own(tensor)):
                    values.copy_(file.get_slice(name)[sharding.own_rows(tensor)])
        self.step = int(step)
        log.info("distillation: resumed at step %d of %d", self.step, self.steps)
        return True

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What a step is continued from, by its name in the file."""
        found = {f"{i}.value": parameter.data for i, parameter in enumerate(self.parameters)}
        for i, parameter in enumerate(self.parameters):
            found |= {f"{i}.{name}": self._optimizer.state[parameter][name] for name in self.MOMENTS}
        return found

    def _keep(self) -> None:
        """Stores this step for a run that resumes this one, by as many processes or others; one tensor is gathered at a time."""
        if self._path is None:
            return
        tensors = self._tensors()
        if not processes.is_first():
            for tensor in tensors.values():
                sharding.whole(tensor)
            return
        about = torch.tensor([self.step, self.before, self.rate], dtype=torch.float64)
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in {self.ABOUT: about, **tensors}.items()}
        with atomic_file(self._path) as partial, TensorFile(partial, layout) as file:
            file.write(self.ABOUT, about)
            for name, tensor in tensors.items():
                file.write(name, sharding.whole(tensor))

    def run(self, loss: _Loss, batches: list[torch.Tensor], progress: Progress) -> None:
        """Takes the steps that are left, and keeps one now and then."""
        every, kept, took = max(1, self.steps // LINES), time.perf_counter(), 0.0
        for batch in batches[self.step :]:
            for group in self._optimizer.param_groups:
                group["lr"] = self.rate * _rate(self.step, self.steps)
            value = loss.backward(batch)
            _add_gradients(self.parameters)
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self.step += 1
            progress("distilling", self.step, self.steps)
            if self.step % every == 0:
                log.info("distillation: step %d of %d, divergence %.4f nats per token", self.step, self.steps, value)
                begun = time.perf_counter()
                if processes.from_all(took < QUICK or begun - kept > SELDOM * took)[0]:  # the first one's clock is that of all
                    self._keep()
                    kept, took = time.perf_counter(), time.perf_counter() - begun
            if not math.isfinite(value):
                break


def _put_back(student, start: dict[str, torch.Tensor]) -> None:
    for name, values in start.items():
        student.get_parameter(name).data.copy_(values)


@contextmanager
def _as_before(student, start: dict[str, torch.Tensor], home: torch.device):
    """Puts the student back as it was, where the block raises."""
    try:
        yield
    except BaseException:
        _put_back(student, start)
        student.to(home)
        raise


def _add_gradients(parameters: list[nn.Parameter]) -> None:
    """Sums the gradients over the processes; of a sharded model they are sums already.

    What has none is given zeros: in a process that had no row of a batch, so that all reduce the same tensors; and what no loss depends on
    (biases by which experts are balanced), so that the optimizer has moments of every parameter.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not sharding.is_share(parameters[0]):
        processes.add(*(parameter.grad for parameter in parameters))


def _default_rate(mode: str, parameters: list[nn.Parameter], divergence: float) -> float:
    """The peak learning rate (docs/method.md, section 7).

    A step of Adam changes each weight by about the learning rate, so it is a share of the matrices' root mean square, which differs from
    model to model; it is smaller where little is left to learn.
    """
    if mode == "scales":
        return SCALES_RATE
    matrices = [parameter.detach() for parameter in parameters if parameter.ndim > 1]
    size = float(sharding.whole(torch.nn.utils.get_total_norm(matrices))) / math.sqrt(sum(matrix.numel() for matrix in matrices))
    return ALL_RATE * size * min(math.sqrt(divergence), 2.0)


def _shuffled(numbers: torch.Tensor, seed: int) -> torch.Tensor:
    return numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))]


def _rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a linear rise over WARMUP of the steps, under a cosine that falls to zero."""
    return min(1.0, (step + 1) / max(1.0, WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def trained_names(model, mode: str) -> list[str]:
    """The parameters of ``model`` that a distillation changes: norms, biases and output projections, or the whole decoder."""
    adapter = LayerAdapter(model.config)
    outputs = {id(part.output.weight) for part in adapter.projected_parts(model)}
    inside = (adapter.layers_name(), adapter.norm_name())
    return [
        name
        for name, parameter in model.named_parameters()
        if name.startswith(inside) and (mode == "all" or parameter.ndim == 1 or id(parameter) in outputs)
    ]


@contextmanager
def _trainable(model, mode: str, compute: torch.dtype):
    """The parameters to train, in float32; the others are in the dtype that the model ``compute``s in, where it is not their own.

    Afterwards all are as they were in dtype, those not trained also in value, and the scales are folded into the weights.
    """
    adapter, hooks, scales = LayerAdapter(model.config), [], []
    flags = [(parameter, parameter.requires_grad, parameter.dtype) for parameter in model.parameters()]
    model.requires_grad_(False)
    chosen = [model.get_parameter(name) for name in trained_names(model, mode)]
    if mode == "scales":
        chosen = [parameter for parameter in chosen if parameter.ndim == 1]
        for part in adapter.projected_parts(model):
            scale = nn.Parameter(torch.ones(part.output.in_features, device=part.output.weight.device))
            scales.append((part.output, scale))
            hooks.append(part.output.register_forward_pre_hook(lambda _, args, scale=scale: (args[0] * scale,)))
    for parameter in chosen:
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
    untrained = [(parameter, parameter.data) for parameter in model.parameters() if not parameter.requires_grad]
    for parameter, values in untrained:
        if values.dtype != torch.float32:  # which autocast takes as it is
            parameter.data = values.to(compute)
    try:
        yield [*chosen, *(scale for _, scale in scales)]
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, values in untrained:
            parameter.data = values
        for linear, scale in scales:
            linear.weight.data = (linear.weight.data.float() * scale.data).to(linear.weight.dtype)
        for parameter, required, dtype in flags:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(required)
            parameter.grad = None


class _Loss:
    """KL(teacher || student) in nats, mean over the tokens of some samples, of all processes together."""

    def __init__(self, student, teacher: Teacher, sharded: bool = False):
        self.student, self.teacher, self.adapter, self.sharded = student, teacher, LayerAdapter(student.config), sharded
        head = self.adapter.head(student)
        self.head = head if head.weight.dtype == teacher.dtype else copy.deepcopy(head).to(teacher.dtype)
        self.passes = max(1, BATCH_TOKENS // teacher.ids.shape[1])  # samples that one forward pass takes

    def backward(self, samples: torch.Tensor) -> float:
        """The loss, whose gradient is added to the parameters'."""
        return self._of(samples, True)

    @torch.no_grad()
    def mean(self, samples: torch.Tensor) -> float:
        """The loss without its gradient."""
        return self._of(samples, False)

    def _of(self, samples: torch.Tensor, with_gradient: bool) -> float:
        teacher, total = self.teacher, 0.0
        tokens = len(samples) * teacher.ids.shape[1] * (1 if teacher.shared else processes.count())  # of all processes
        for rows in self._passes(samples):
            casts = teacher.dtype != torch.float32 and not self.sharded  # a sharded model gathers its weights in that dtype
            autocast = torch.autocast(teacher.device.type, teacher.dtype, enabled=casts)
            with autocast:
                ids = teacher.ids[rows if len(rows) else [0]].to(teacher.device)
                states = self.adapter.last_states(self.student, ids).flatten(0, 1)
            if not len(rows):
                if with_gradient:
                    states.backward(torch.zeros_like(states))
                continue
            taught = torch.cat([teacher.states[int(row)] for row in rows])
            loss = _DivergenceFromStates.apply(states.to(teacher.dtype), taught, lambda part: self.adapter.logits(self.head, part)) / tokens
            total += float(loss.detach())
            if with_gradient:
                loss.backward()
        return processes.total(total)[0]

    def _passes(self, samples: torch.Tensor) -> list[torch.Tensor]:
        """The rows of this process, as many at a time as one forward pass takes.

        A sharded model is run equally often in each process, since all of them gather its layers: where others have rows left, without any.
        """
        rows = self.teacher.local_rows(samples)
        parts = list(rows.split(self.passes)) if len(rows) else []
        if self.sharded:
            most = max(len(self.teacher.local_rows(samples, rank)) for rank in range(processes.count()))
            parts += [rows[:0]] * (-(-most // self.passes) - len(parts))
        return parts


class _DivergenceFromStates(torch.autograd.Function):
    """:class:`Divergence` of the logits that follow from the teacher's and the student's states [rows, D]; differentiable in the latter.

    LOSS_ROWS rows at a time, forward and backward at once, so that no more logits than these are ever held.
    """

    @staticmethod
    def forward(ctx, student, teacher, logits):
        gradient, total = torch.zeros_like(student), 0.0
        for rows, taught, into in zip(student.split(LOSS_ROWS), teacher.split(LOSS_ROWS), gradient.split(LOSS_ROWS)):
            log_p = logits(taught).log_softmax(-1)
            with torch.enable_grad():
                rows = rows.detach().requires_grad_()
                divergence = Divergence.apply(logits(rows), log_p, log_p.exp())
            total += float(divergence)
            divergence.backward()
            into.copy_(rows.grad)
        ctx.save_for_backward(gradient)
        return student.new_tensor(total, dtype=torch.float32)

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


def trained_parameters(run: Run, plans: list[LayerPlan]) -> int:
    """How many parameters a distillation of the pruned model trains; 0 where there is none."""
    if run.config.distill == "all":
        return run.shape.decoder_parameters - removed_parameters(run.shape, plans, run.config)
    scales = ((plan.units[part.kind], part) for layer, plan in zip(run.shape.layers, plans) for part in layer.parts)
    of_scales = 4 * run.shape.hidden * len(plans) + sum(part.output_inputs(units) for units, part in scales)
    return of_scales if run.config.distill == "scales" else 0


def kept_bytes(run: Run, plans: list[LayerPlan]) -> int:
    """What the last saved step of a distillation takes on the disk, while the next one replaces it."""
    return 0 if run.config.resume is False else 2 * 4 * (1 + len(_Training.MOMENTS)) * trained_parameters(run, plans)


def peak_bytes(run: Run, plans: list[LayerPlan], sizes: Sizes) -> tuple[int, int]:
    """(bytes where it is computed, bytes on the host beside a GPU) while distilling: the pruned model, gradients and moments of what is
    trained, what is kept for a backward pass. Of several processes that train every weight each holds its share.
    """
    shape, config = run.shape, run.config
    if config.distill == "none":
        return 0, 0
    decoder = shape.decoder_parameters - removed_parameters(shape, plans, config)
    inner = [[part.output_inputs(plan.units[part.kind]) for part in layer.parts] for layer, plan in zip(shape.layers, plans)]
    student = (decoder + shape.other_parameters) * sizes.compute
    if config.distill == "all" and processes.expected() > 1:
        share, beside = _sharded_bytes(shape, inner, decoder, processes.expected(), sizes.compute, sizes.evaluation)
        if not sizes.on_gpu:
            return student + share + beside, 0
        return (beside, student + share) if share + beside > sizes.free else (share + beside, student)
    trained = trained_parameters(run, plans)  # in float32, with a gradient and two moments, and as they were
    here = student + trained * (4 * (3 + (sizes.compute != 4)) + sizes.compute)
    if sizes.evaluation != sizes.compute:
        here += decoder * sizes.evaluation
    return here + _pass_bytes(shape, inner, sizes.evaluation), student


def _pass_bytes(shape: ModelShape, inner: list[list[int]], size: int) -> int:
    """Bytes of one pass forwards and backwards: what is kept of it, the head and some logits. ``inner``: the inputs of the output
    projections of each layer; ``size``: bytes of a number.
    """
    kept = sum(10 * shape.hidden + 5 * max(widths) + 4 * min(widths) for widths in inner) * BATCH_TOKENS * 6
    return kept + shape.vocab * shape.hidden * size + 5 * LOSS_ROWS * shape.vocab * 4


def _sharded_bytes(shape: ModelShape, inner: list[list[int]], decoder: int, count: int, compute: int, size: int) -> tuple[int, int]:
    """(bytes of the share that each of ``count`` processes holds of so many trained parameters, bytes of all else where it is computed).

    A share is of values, gradients and two moments. All else is what is not trained, one pass, and what is gathered of a layer: its weights
    and those of the next, each also in the tensor that they came in, its gradients, and these twice in float32, on their way to the shares.
    """
    layer = max(layer.parameters for layer in shape.layers)
    untrained = shape.other_parameters * max(compute, size)
    return -(-decoder // count) * 4 * 4, untrained + layer * (5 * size + 2 * 4) + _pass_bytes(shape, inner, size)


def _offloads(student, device: torch.device, compute: torch.dtype) -> bool:
    """Whether the shares have to lie in the memory of the host, since some process's GPU has no room for its own."""
    if device.type != "cuda":
        return False
    torch.cuda.empty_cache()
    shape = shape_of(student.config)
    inner = [[part.output_inputs() for part in layer.parts] for layer in shape.layers]
    of_shares = _sharded_bytes(shape, inner, shape.decoder_parameters, processes.count(), student.dtype.itemsize, compute.itemsize)
    return processes.total(float(sum(of_shares) > free_memory(device)))[0] > 0
