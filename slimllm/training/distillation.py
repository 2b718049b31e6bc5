"""Distillation of a pruned model from the dense one it came from, on a few hundred samples of text (not from the paper).

The loss is the KL divergence of the dense model's next-token distribution from the pruned one's, in nats per token. The dense
model runs once, beforehand, and only its last states are kept; its distributions follow from them and from the output head, which
both models share. So the two are never in memory together, and no logits are kept.
"""

from __future__ import annotations

import copy
import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UserError
from ..models.adapter import LayerAdapter
from ..models.source import ModelSource
from ..pruning.footprint import DISTILLED_ROWS, DISTILLED_TOKENS
from ..streaming.activations import ActivationMemory, ActivationStore
from ..streaming.progress import Progress, no_progress
from ..streaming.runner import MIN_ACTIVATION_BYTES, LayerRunner
from ..utils import processes
from ..utils.device import distillation_dtype, resolved
from ..utils.memory import activation_room, return_free_memory

log = logging.getLogger("slimllm")

BATCH_SAMPLES = 8  # per optimizer step
BATCH_TOKENS = DISTILLED_TOKENS  # that one forward pass takes at a time
HELD_OUT = 16  # samples that are not trained on: whether training helped is measured on them
LOSS_ROWS = DISTILLED_ROWS  # whose logits are held at a time
SCALES_RATE, ALL_RATE = 3e-3, 0.0026
WARMUP = 0.1  # share of the steps in which the learning rate rises; then it falls, as a cosine, to zero
LINES = 8  # that the log gets while training


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


class Teacher:
    """What the dense model makes of token ids [samples, length]: its last states after the final norm, one store item per sample.

    Of several processes each keeps its share of the samples: those whose number is its own modulo the number of processes.
    """

    @torch.no_grad()
    def __init__(self, source, ids: torch.Tensor, device="cpu", progress: Progress = no_progress, tmp_dir: str | None = None):
        source, self.device, self.total = ModelSource.of(source), resolved(device), len(ids)
        self.dtype = distillation_dtype(source.dtype, self.device)
        runner = LayerRunner(source, ids, self.device, progress, self.dtype, tmp_dir)
        self.ids, self.states = runner.ids, runner.store()
        hidden = runner.last_states("the dense model's states")
        norm = source.final_norm(self.device, self.dtype)
        for batch in hidden:
            for states in norm(batch):
                self.states.append(states)
        hidden.close()

    @property
    def shared(self) -> bool:
        """Whether each process has some of the samples, rather than all of them, as where there are fewer than processes."""
        return len(self.ids) < self.total

    def own(self, samples: torch.Tensor) -> torch.Tensor:
        """Which rows of ``ids`` the given numbers of samples are, as far as this process has them."""
        count = processes.count() if self.shared else 1
        return samples[samples % count == (processes.rank() if count > 1 else 0)] // count

    def close(self) -> None:
        self.states.close()


def distil(
    student,
    teacher: Teacher,
    mode: str,
    epochs: int = 1,
    learning_rate: float | None = None,
    seed: int = 42,
    progress: Progress = no_progress,
    saved: torch.dtype | None = None,
) -> Distillation:
    """Trains ``student``, a pruned model in memory, in place. The last HELD_OUT samples (at most a quarter) are not trained on.

    Args:
        mode: "all", every weight of the decoder; or "scales", its biases and norms, and a factor for each input column of the output
            projections, which is folded into their weights at the end. Neither adds parameters.
        learning_rate: at its peak; by default what measured best (:func:`_default_rate`).
        saved: the dtype that it will be saved in, by default its own: what was trained is rounded to it before it is measured.
    Where the divergence does not fall, the student is left as it was, and the log says so; it is so too where anything raises.
    Raises UserError for fewer than two samples.
    """
    if teacher.total < 2:
        raise UserError("distillation: one sample is too few, since some are held out; raise --distill_examples")
    held_out = min(HELD_OUT, teacher.total // 4) or 1
    numbers = torch.arange(teacher.total)
    train, rest = numbers[:-held_out], numbers[-held_out:]
    batches = [part for epoch in range(epochs) for part in _shuffled(train, seed + epoch).split(BATCH_SAMPLES)]
    home, names = next(student.parameters()).device, trained_names(student, mode)
    student.to(teacher.device)
    start = {name: student.get_parameter(name).detach().clone() for name in names}
    with _as_before(student, start, home), _trainable(student, mode, teacher.dtype) as parameters:
        loss = _Loss(student, teacher)
        before = loss.mean(rest)
        learning_rate = learning_rate or _default_rate(mode, parameters, before)
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, len(batches)))
        for step, batch in enumerate(batches, 1):
            value = loss.backward(batch)
            _add_gradients(parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            progress("distilling", step, len(batches))
            if step % max(1, len(batches) // LINES) == 0:
                log.info("distillation: step %d of %d, divergence %.4f nats per token", step, len(batches), value)
            if not math.isfinite(value):
                break
        trained = sum(parameter.numel() for parameter in parameters)
        del optimizer, loss
    for name in names:
        parameter = student.get_parameter(name)
        parameter.data = parameter.data.to(saved or parameter.dtype).to(parameter.dtype)
    with _as_before(student, start, home), _trainable(student, mode, teacher.dtype):
        after = _Loss(student, teacher).mean(rest)
    kept = after < before
    if not kept:
        _put_back(student, start)
    student.to(home)
    return_free_memory()
    log.info("distillation: divergence on held-out samples %.4f -> %.4f nats per token", before, after)
    if not kept:
        log.warning("distillation: the divergence did not fall, so the pruned model stays as it was; lower --distill_learning_rate")
    after = after if math.isfinite(after) else None  # JSON knows no NaN
    return Distillation(mode, len(train), held_out, epochs, learning_rate, len(batches), trained, before, after, kept)


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
    """Sums the gradients over the processes; one that had no row of a batch has zeros, so that all reduce the same tensors."""
    if processes.count() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    processes.add(*(parameter.grad for parameter in parameters))


def _default_rate(mode: str, parameters: list[nn.Parameter], divergence: float) -> float:
    """A step of Adam moves each weight by about the learning rate, so it is a share of the matrices' root mean square, which differs
    from model to model; it is less where the model is near its aim already."""
    if mode == "scales":
        return SCALES_RATE
    matrices = [parameter.detach() for parameter in parameters if parameter.ndim > 1]
    size = float(torch.nn.utils.get_total_norm(matrices)) / math.sqrt(sum(matrix.numel() for matrix in matrices))
    return ALL_RATE * size * min(math.sqrt(divergence), 2.0)


def _shuffled(numbers: torch.Tensor, seed: int) -> torch.Tensor:
    return numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))]


def _rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a linear rise over WARMUP of the steps, under a cosine that falls to zero."""
    return min(1.0, (step + 1) / max(1.0, WARMUP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def trained_names(model, mode: str) -> list[str]:
    """The parameters of ``model`` that a distillation changes: norms, biases and output projections, or the whole decoder."""
    adapter = LayerAdapter(model.config)
    outputs = {id(block.output.weight) for blocks in adapter.blocks(model) for block in blocks}
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
        for block in (block for blocks in adapter.blocks(model) for block in blocks):
            scale = nn.Parameter(torch.ones(block.output.in_features, device=block.output.weight.device))
            scales.append((block.output, scale))
            hooks.append(block.output.register_forward_pre_hook(lambda _, args, scale=scale: (args[0] * scale,)))
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
        for parameter, wanted, dtype in flags:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(wanted)
            parameter.grad = None


class _Loss:
    """KL(teacher || student) in nats, mean over the tokens of some samples, of all processes together."""

    def __init__(self, student, teacher: Teacher):
        self.student, self.teacher, self.adapter = student, teacher, LayerAdapter(student.config)
        head = self.adapter.head(student)
        self.head = head if head.weight.dtype == teacher.dtype else copy.deepcopy(head).to(teacher.dtype)
        self.passes = max(1, BATCH_TOKENS // teacher.ids.shape[1])  # samples that one forward pass takes

    def backward(self, samples: torch.Tensor) -> float:
        """The loss, whose gradient is added to the parameters'."""
        return self._of(samples, True)

    @torch.no_grad()
    def mean(self, samples: torch.Tensor) -> float:
        return self._of(samples, False)

    def _of(self, samples: torch.Tensor, with_gradient: bool) -> float:
        teacher, total = self.teacher, 0.0
        tokens = len(samples) * teacher.ids.shape[1] * (1 if teacher.shared else processes.count())  # of all processes
        for rows in teacher.own(samples).split(self.passes):
            if not len(rows):
                continue
            autocast = torch.autocast(teacher.device.type, teacher.dtype, enabled=teacher.dtype != torch.float32)
            with autocast:
                states = self.adapter.last_states(self.student, teacher.ids[rows].to(teacher.device)).flatten(0, 1)
            wanted = torch.cat([teacher.states[int(row)] for row in rows])
            loss = _KlFromStates.apply(states.to(teacher.dtype), wanted, lambda part: self.adapter.logits(self.head, part)) / tokens
            total += float(loss.detach())
            if with_gradient:
                loss.backward()
        return processes.total(total)[0]


class RowTeacher:
    """What a dense model makes of rows of different lengths: its last states of each row, and its own output head.

    It runs once, on rows of similar length together, so what is added to shorter ones (behind their end, where no token of theirs looks)
    costs little.
    """

    GROUPS = 4  # of similar length; the model's files are read once for each

    def __init__(self, source, rows: list[list[int]], device="cpu", progress: Progress = no_progress, tmp_dir: str | None = None):
        self.source, self.device = ModelSource.of(source), resolved(device)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        self._at = {row: place for place, row in enumerate(order)}
        self.states = ActivationStore(ActivationMemory(activation_room(self.device, MIN_ACTIVATION_BYTES), tmp_dir))
        for some in torch.tensor(order).tensor_split(self.GROUPS):
            if not len(some):
                continue
            length = len(rows[some[-1]])
            padded = torch.tensor([rows[i] + [0] * (length - len(rows[i])) for i in some.tolist()])
            teacher = Teacher(self.source, padded, self.device, progress, tmp_dir)
            self.dtype = teacher.dtype
            for i, states in zip(some.tolist(), teacher.states):
                self.states.append(states[: len(rows[i])].clone())
            teacher.close()
        self._head = self.source.head(self.device, self.dtype)

    @torch.no_grad()
    def log_probabilities(self, row: int) -> torch.Tensor:
        """log p [tokens, V] of the token after each one of a row."""
        return self.source.adapter.logits(self._head, self.states[self._at[row]]).log_softmax(-1)


class _KlFromStates(torch.autograd.Function):
    """Sum over rows of KL(p || q) in nats, of the logits that follow from states [rows, D]; differentiable in the student's.

    LOSS_ROWS rows at a time, forward and backward at once, so that no more logits than these are ever held.
    """

    @staticmethod
    def forward(ctx, student, teacher, logits):
        gradient, total = torch.empty_like(student), 0.0
        for rows, wanted, into in zip(student.split(LOSS_ROWS), teacher.split(LOSS_ROWS), gradient.split(LOSS_ROWS)):
            log_p = logits(wanted).log_softmax(-1)
            p = log_p.exp()
            with torch.enable_grad():
                rows = rows.detach().requires_grad_()
                found = logits(rows)
            log_q = found.detach().log_softmax(-1)
            total += float(torch.dot(p.view(-1), log_p.sub_(log_q).view(-1)))
            torch.autograd.backward(found, log_q.exp_().sub_(p))  # dKL / dlogits = q - p
            into.copy_(rows.grad)
        ctx.save_for_backward(gradient)
        return student.new_tensor(total, dtype=torch.float32)

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None
