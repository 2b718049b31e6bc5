"""The layer adapter: the one place that finds the modules, rows and columns of a real model by its row of the family table.

Everything above learns from it which parts a layer has, which rows of which projection belong to a unit, how a part's output joins the
residual stream, what the final norm and the head make of the last states.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection

import torch
from torch import nn

from .families import Family, PartRow, family_of
from .parts import Kept, Units, head_dim_of, token_inputs_of


def blocks_of_columns(blocks: torch.Tensor, width: int) -> torch.Tensor:
    """Indices of the columns (or rows) of whole blocks: [len(blocks) * width]."""
    return (blocks[:, None] * width + torch.arange(width, device=blocks.device)).flatten()


class Part:
    """One part of one layer, with its modules.

    ``kind``: as in :mod:`parts`. ``norm`` comes before ``module``, ``post_norm`` after it, and ``multiplier`` scales what is added to the
    residual stream.
    """

    def __init__(self, row: PartRow, layer: nn.Module, head_dim: int, multiplier: float):
        self.row, self.kind, self.head_dim = row, row.kind, head_dim
        self.module: nn.Module = getattr(layer, row.module)
        self.scale = 1.0 if row.scale is None else getattr(self.module, row.scale)
        self.multiplier = multiplier * self.scale
        self.norm, self.post_norm = (None if name is None else getattr(layer, name) for name in (row.norm, row.post_norm))

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """What ``module`` is given for the residual stream ``states`` [..., D]."""
        return states if self.norm is None else self.norm(states)

    def join(self, states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The residual stream after this part, whose output projection gave ``output`` [..., D]."""
        output = output.view_as(states)
        if self.post_norm is not None:
            output = self.post_norm(output)
        return states + (output if self.multiplier == 1 else output * self.multiplier)

    @property
    def units(self) -> Units:
        """How many units of each sort it has, from its modules."""
        raise NotImplementedError


class ProjectedPart(Part):
    """A part that ends in a projection, ``output``, whose input columns belong to units."""

    def __init__(self, row: PartRow, layer: nn.Module, head_dim: int, multiplier: float):
        super().__init__(row, layer, head_dim, multiplier)
        self.output: nn.Linear = getattr(self.module, row.output)

    def run(self, inputs: torch.Tensor, arguments: dict) -> None:
        """Calls ``module``. ``arguments``: what the layer is called with besides the states."""
        self.module(inputs)

    @property
    def linears(self) -> list[nn.Linear]:
        """All projections of the part, inputs and output."""
        return [child for child in self.module.children() if isinstance(child, nn.Linear)]

    @property
    def inputs(self) -> list[nn.Linear]:
        """The projections whose rows belong to units."""
        return [getattr(self.module, name) for name in self.row.inputs]

    def _split(self, rows: list[torch.Tensor], sizes: list[int]) -> list[tuple[nn.Linear, torch.Tensor]]:
        """Pairs each projection with its rows; where one holds all of them, stacked in this order. ``sizes``: all but the last."""
        linears = self.inputs
        if len(linears) == len(rows):
            return list(zip(linears, rows))
        offsets = [sum(sizes[:i]) for i in range(len(rows))]
        return [(linears[0], torch.cat([offset + part for offset, part in zip(offsets, rows)]))]

    # of each kind

    def rows(self, kept: Kept) -> list[tuple[nn.Linear, torch.Tensor]]:
        """(projection, its rows that belong to these units), for each of ``inputs``."""
        raise NotImplementedError

    def columns(self, kept: Kept, device=None) -> torch.Tensor:
        """The columns of ``output`` that belong to these units."""
        raise NotImplementedError

    def note_units(self, units: Units) -> None:
        """Brings the widths that the modules store of themselves up to date, once they are sliced."""
        raise NotImplementedError

    def unit_sums(self, rows: torch.Tensor, columns: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sums of numbers over what goes with each unit, by sort: over its ``rows`` (:meth:`rows`, joined) and its ``columns`` of
        ``output``; those of query heads and KV heads apart.
        """
        raise NotImplementedError


class Attention(ProjectedPart):
    """Query heads that share KV heads in equal groups."""

    def run(self, inputs: torch.Tensor, arguments: dict) -> None:
        """Calls the attention with the arguments of the layer: mask, position embeddings and the like."""
        self.module(inputs, **arguments)

    @property
    def units(self) -> Units:
        """{"heads": query heads, "kv_heads": KV heads}, from the widths of the projections."""
        heads = self.output.in_features // self.head_dim
        rows = sum(linear.out_features for linear in self.inputs)
        return {"heads": heads, "kv_heads": (rows - heads * self._query_rows) // self.head_dim // 2}

    @property
    def _query_rows(self) -> int:
        """Rows of the query projection that each query head has."""
        return self.head_dim * (2 if self.row.output_gate else 1)

    def rows(self, kept: Kept) -> list[tuple[nn.Linear, torch.Tensor]]:
        """Rows of the query projection that belong to kept query heads; of key and value projections those of kept KV heads."""
        before, widths = self.units, {"heads": self._query_rows, "kv_heads": self.head_dim}
        queries, pairs = (blocks_of_columns(torch.as_tensor(kept[sort]), width) for sort, width in widths.items())
        return self._split([queries, pairs, pairs], [before[sort] * width for sort, width in widths.items()])

    def columns(self, kept: Kept, device=None) -> torch.Tensor:
        """Columns of kept query heads: [heads * head size]."""
        return blocks_of_columns(torch.as_tensor(kept["heads"], device=device), self.head_dim)

    def unit_sums(self, rows: torch.Tensor, columns: torch.Tensor) -> dict[str, torch.Tensor]:
        """A query head has its rows of queries and its columns of the output, a KV head its rows of keys and of values."""
        units = self.units
        pairs = units["kv_heads"] * self.head_dim
        queries, keys, values = (part.view(-1, self.head_dim).sum(1) for part in rows.split([len(rows) - 2 * pairs, pairs, pairs]))
        return {"heads": queries.view(units["heads"], -1).sum(1) + columns.view(-1, self.head_dim).sum(1), "kv_heads": keys + values}

    def note_units(self, units: Units) -> None:
        """Sets the size of a group, and of a fused projection what it is split by."""
        heads, kv_heads = units["heads"], units["kv_heads"]
        self.module.num_key_value_groups = heads // kv_heads
        if len(self.row.inputs) == 1:  # the module splits a fused projection by its config
            self.module.config = copy.copy(self.module.config)
            self.module.config.num_attention_heads, self.module.config.num_key_value_heads = heads, kv_heads
            self.module.num_key_value_heads = kv_heads


class Mlp(ProjectedPart):
    """A feed-forward part, whose channels may be scaled by a gate."""

    @property
    def units(self) -> Units:
        """{"channels": channels}, from the width of the output projection."""
        return {"channels": self.output.in_features}

    def rows(self, kept: Kept) -> list[tuple[nn.Linear, torch.Tensor]]:
        """The same rows of gate, where there is one, and up projection."""
        channels = torch.as_tensor(kept["channels"])
        return self._split([channels, channels], [self.units["channels"]]) if self.row.gate else [(self.inputs[0], channels)]

    def columns(self, kept: Kept, device=None) -> torch.Tensor:
        """The kept channels themselves."""
        return torch.as_tensor(kept["channels"], device=device)

    def note_units(self, units: Units) -> None:
        """Sets the intermediate size."""
        self.module.intermediate_size = units["channels"]

    def unit_sums(self, rows: torch.Tensor, columns: torch.Tensor) -> dict[str, torch.Tensor]:
        """A channel has one row of gate, where there is one, one of up and one column of down."""
        return {"channels": columns + rows.view(-1, len(columns)).sum(0)}

    def gate_and_up(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Weights [I, D] of the gate, None where there is none, and the up projection, float32."""
        weights = [linear.weight.float() for linear in self.inputs]
        if not self.row.gate:
            return None, weights[0]
        gate, up = weights if len(weights) == 2 else weights[0].chunk(2)
        return gate, up


_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # attributes in which modules keep how many there are
_WIDTHS = ("intermediate_dim", "intermediate_size")  # the same of the channels of each


class Experts(Part):
    """A router and its experts: ``experts`` is called with (states [T, D], the experts of each token [T, k], their weights [T, k]).

    What they give together counts ``scale`` times in what the part gives.
    """

    def __init__(self, row: PartRow, layer: nn.Module, head_dim: int, multiplier: float):
        super().__init__(row, layer, head_dim, multiplier)
        self.multiplier = multiplier
        self.router: nn.Module = getattr(self.module, row.inputs[0])
        self.experts: nn.Module = getattr(self.module, row.output)

    @property
    def units(self) -> Units:
        """{"experts": experts, "channels": channels of each}, from their weights, which are stacked."""
        shape = getattr(self.experts, self.row.stacked[1]).shape
        return {"experts": shape[0], "channels": shape[1 if self.row.transposed else 2]}

    @property
    def channel_parameters(self) -> int:
        """Parameters of one channel of one expert; 0 where channels cannot go."""
        return 0 if not self.row.fits else sum(tensor.numel() for _, tensor, _, _ in self.by_channel()) // math.prod(self.units.values())

    def by_channel(self) -> list[tuple[str, torch.Tensor, int, int]]:
        """(name, tensor, its axis along the channels, how many rows there each channel has) of the experts' parameters that have one."""
        inputs, output = self.row.stacked
        gate, down = (2, 1) if self.row.transposed else (1, 2)
        found = [(inputs, getattr(self.experts, inputs), gate, 2), (output, getattr(self.experts, output), down, 1)]
        bias = getattr(self.experts, f"{inputs}_bias", None)
        return found if bias is None else [*found, (f"{inputs}_bias", bias, 1, 2)]

    def rows_of(self, channels: torch.Tensor) -> torch.Tensor:
        """The rows [E, 2 n] of the stacked gates and ups that belong to ``channels`` [E, n] of each expert."""
        if self.row.transposed:
            return torch.stack([2 * channels, 2 * channels + 1], -1).flatten(1)
        return torch.cat([channels, self.units["channels"] + channels], 1)

    def gate_and_up(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [I, D] of an expert's gate and up projections, float32."""
        weight = getattr(self.experts, self.row.stacked[0]).data[expert].float()
        return (weight.T[::2], weight.T[1::2]) if self.row.transposed else weight.chunk(2)

    def activations(self, expert: int, states: torch.Tensor) -> torch.Tensor:
        """The inputs [T, I] of an expert's output projection for what it reads, ``states`` [T, D]."""
        name = self.row.stacked[0]
        weight, bias = getattr(self.experts, name)[expert], getattr(self.experts, f"{name}_bias", None)
        weight = weight.T if self.row.transposed else weight
        return self.experts._apply_gate(nn.functional.linear(states, weight, None if bias is None else bias[expert]))

    def projection(self, expert: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight [D, I], bias [D] or None) of an expert's output projection, which may be changed in place."""
        name = self.row.stacked[1]
        weight, bias = getattr(self.experts, name).data[expert], getattr(self.experts, f"{name}_bias", None)
        return weight.T if self.row.transposed else weight, None if bias is None else bias.data[expert]

    def give(self, states: torch.Tensor) -> torch.Tensor:
        """What the part makes of the residual stream ``states`` [..., D], before it joins it."""
        given = self.module(self.read(states))
        return given[0] if isinstance(given, tuple) else given

    def tensors(self) -> list[tuple[nn.Module, str, torch.Tensor, int | None]]:
        """(module, name in it, tensor, its axis along the experts, or None) of all parameters and buffers of the part.

        Those of the experts, of the router, and of the part itself have such an axis where one is as long; shared experts have none.
        """
        count, cut = self.units["experts"], [self.module, *self.router.modules(), *self.experts.modules()]
        found = []
        for module in (inner for holder in self._holders for inner in holder.modules()):
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                axis = list(tensor.shape).index(count) if count in tensor.shape and any(module is one for one in cut) else None
                found.append((module, name, tensor, axis))
        return found

    @property
    def _holders(self) -> list[nn.Module]:
        """The modules that hold all that the part counts."""
        return [self.module]

    def note_units(self, units: Units) -> None:
        """Brings the numbers of experts that the modules store up to date, once they are sliced."""
        for module in (self.module, *self.router.modules(), *self.experts.modules()):
            for name in vars(module).keys() & set(_COUNTS):
                setattr(module, name, units["experts"])
            if isinstance(module, nn.Linear):
                module.out_features = len(module.weight)
        for name in vars(self.experts).keys() & set(_WIDTHS):
            setattr(self.experts, name, units["channels"])


class ExpertsBeside(Experts):
    """A router and its experts beside a feed-forward part that stays whole: each gives something that is normed, and their sum is normed
    again before it joins the residual stream. What experts give, which is fitted, is counted before these norms.
    """

    def __init__(self, row: PartRow, layer: nn.Module, head_dim: int, multiplier: float):
        Part.__init__(self, row, layer, head_dim, multiplier)
        self.router, self.experts = getattr(layer, row.inputs[0]), self.module
        self.own_norm, self.beside = getattr(layer, row.own_norm), Mlp(row.beside, layer, head_dim, 1.0)

    def give(self, states: torch.Tensor) -> torch.Tensor:
        """What the experts make of the residual stream ``states`` [..., D]."""
        states = states.flatten(0, -2)
        _, weights, routed = self.router(states)
        return self.experts(self.read(states), routed, weights)

    def join(self, states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The residual stream behind both, where the experts give ``output`` [T, D]."""
        beside = self.beside.post_norm(self.beside.module(self.beside.read(states)))
        return super().join(states, beside + self.own_norm(output.view_as(states)))

    @property
    def _holders(self) -> list[nn.Module]:
        return [self.router, self.experts]


class _Reached(Exception):
    """The states that a layer had where it was stopped."""


class Mixer:
    """What a layer computes before the norm of its next part, or all that it computes where it has no other, run as it is; or a number by
    which a layer multiplies the state.

    The layer itself is called, and stopped there: no family's way to call what it holds is repeated here.
    """

    kind = "mixer"

    def __init__(self, layer: nn.Module, until: nn.Module | None, what: nn.Module | torch.Tensor):
        self._layer, self._until, self._what = layer, until, what

    def after(self, states: torch.Tensor, arguments: dict) -> torch.Tensor:
        """The residual stream behind it. ``arguments``: what the layer is called with besides the ``states`` [..., D]."""
        if isinstance(self._what, torch.Tensor):
            return states * self._what
        if self._until is None:
            given = self._layer(states, **arguments)
            return given[0] if isinstance(given, tuple) else given

        def stop(_, inputs):
            raise _Reached(inputs[0])

        hook = self._until.register_forward_pre_hook(stop)
        try:
            self._layer(states, **arguments)
        except _Reached as reached:
            return reached.args[0]
        finally:
            hook.remove()
        raise RuntimeError(f"{type(self._layer).__name__} never came to the norm of its next part")


class TokenInput(Mixer):
    """What a layer makes of the input that it is given for each token, besides the state (:data:`families.TOKEN_INPUT`)."""

    def __init__(self, row: PartRow, layer: nn.Module, argument: str):
        self._layer, self._row, self._argument = layer, row, argument

    def after(self, states: torch.Tensor, arguments: dict) -> torch.Tensor:
        """The residual stream behind it. ``arguments``: what the layer is called with besides the ``states`` [..., D]."""
        layer, row = self._layer, self._row
        inner = layer.act_fn(getattr(layer, row.inputs[0])(states)) * arguments[self._argument]
        return states + getattr(layer, row.post_norm)(getattr(layer, row.module)(inner))


_PARTS = {"attention": Attention, "mlp": Mlp, "experts": Experts}


def part_of(row: PartRow, layer: nn.Module, head_dim: int, multiplier: float) -> Part:
    """The part of a layer that this row says where to find."""
    return (ExpertsBeside if row.beside else _PARTS[row.kind])(row, layer, head_dim, multiplier)


class LayerAdapter:
    """What models of one family, dense or pruned, are made of. ``config`` is the model's; ``family`` defaults to its row of the table."""

    def __init__(self, config, family: Family | None = None):
        self.family = family or family_of(config)
        self.config = config
        self.head_dim = head_dim_of(config)

    # the model

    def decoder(self, model) -> nn.Module:
        """The module that holds embeddings, layers and final norm."""
        return getattr(model, self.family.decoder)

    def layers(self, model) -> nn.ModuleList:
        """The layers of a model, which may be changed in place."""
        return getattr(self.decoder(model), self.family.layers)

    def set_layers(self, model, layers: nn.ModuleList) -> None:
        """Puts ``layers`` in the place of the model's."""
        setattr(self.decoder(model), self.family.layers, layers)

    def final_norm(self, model) -> nn.Module:
        """The norm between the last layer and the output head."""
        return getattr(self.decoder(model), self.family.final_norm)

    def head(self, model) -> nn.Module:
        """The output head, a Linear from [..., D] to [..., V]."""
        return getattr(model, self.family.head)

    def last_states(self, model, ids: torch.Tensor, **inputs) -> torch.Tensor:
        """The states [..., D] that the head makes logits of: after the last layer and the final norm."""
        return self.decoder(model)(input_ids=ids, use_cache=False, **inputs).last_hidden_state

    def logits(self, head: nn.Module, states: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] in float32 of normed states [..., D], scaled and capped as the family's own class does."""
        logits = head(states).float()
        if divisor := self._setting(self.family.logits_divisor):
            logits = logits / divisor
        if (factor := self._setting(self.family.logits_multiplier)) is not None:
            logits = logits * factor
        if cap := self._setting(self.family.logits_softcap):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _setting(self, name: str | None):
        return None if name is None else getattr(self.config, name, None)

    # its layers

    def steps(self, layer: nn.Module) -> list[list[Part | Mixer]]:
        """The parts of a layer in the order of computation; those of one step read the same state, side by side."""
        multiplier = self._setting(self.family.residual_multiplier)
        if multiplier is None:  # some classes derive it from other settings
            multiplier = getattr(layer, self.family.residual_multiplier or "", 1.0)
        steps = [[row for row in step if row.is_in(layer)] for step in self.family.steps]
        steps, found = [step for step in steps if step], []
        for number, step in enumerate(steps):
            if step[0].sizes:
                found.append([part_of(row, layer, self.head_dim, multiplier) for row in step])
            elif step[0].kind == "token_input":
                found.append([TokenInput(step[0], layer, self.family.token_input)])
            else:
                following = next((row.beside or row for row in sum(steps[number + 1 : number + 2], []) if row.sizes), None)
                until = following and getattr(layer, following.norm, None)
                found.append([Mixer(layer, until, getattr(layer, step[0].module))])
        return found

    def parts(self, layer: nn.Module) -> list[Part]:
        """The parts of a layer that have units, in the order of computation."""
        return [part for step in self.steps(layer) for part in step if isinstance(part, Part)]

    def part(self, layer: nn.Module, kind: str) -> Part:
        """The part of this kind of a layer that has one."""
        return next(part for part in self.parts(layer) if part.kind == kind)

    def all_parts(self, model) -> list[Part]:
        """The parts of all layers."""
        return [part for layer in self.layers(model) for part in self.parts(layer)]

    def projected_parts(self, model) -> list[ProjectedPart]:
        """Those of all layers that end in an output projection."""
        return [part for part in self.all_parts(model) if isinstance(part, ProjectedPart)]

    def modules_of(self, layer: nn.Module, kinds: Collection[str]) -> list[str]:
        """The modules of a layer that its parts of these kinds have and no other part: they themselves, and their norms."""
        rows = [row for step in self.family.steps for row in step if row.is_in(layer)]
        of_others = {name for row in rows if row.kind not in kinds for name in row.norms}
        return sorted({name for row in rows if row.kind in kinds for name in (row.module, *row.norms)} - of_others)

    def units(self, model) -> list[dict[str, Units]]:
        """What each part of each layer has, from the modules."""
        return [{part.kind: part.units for part in self.parts(layer)} for layer in self.layers(model)]

    # names of tensors in a checkpoint

    def layers_name(self) -> str:
        """What the names of all layers' tensors begin with, a point at its end."""
        return f"{self.family.decoder}.{self.family.layers}."

    def layer_name(self, index: int) -> str:
        """What the names of this layer's tensors begin with, a point at its end."""
        return f"{self.layers_name()}{index}."

    def norm_name(self) -> str:
        """What the names of the final norm's tensors begin with."""
        return f"{self.family.decoder}.{self.family.final_norm}."

    def head_name(self) -> str:
        """What the names of the output head's tensors begin with."""
        return f"{self.family.head}."

    def embedding_name(self) -> str:
        """The name of the embeddings [V, D]."""
        return f"{self.family.decoder}.{self.family.embedding}.weight"

    def decoder_name(self) -> str:
        """What the names of all the decoder's tensors begin with."""
        return f"{self.family.decoder}."

    def token_table_name(self) -> str | None:
        """The name of the table of what layers are given for each token, in a model that has one."""
        return f"{self.family.decoder}.{self.family.token_table}.weight" if token_inputs_of(self.config, self.family) else None

    def is_output(self, name: str) -> bool:
        """Whether this is the name of an output projection, of experts too, whose columns go where units do."""
        return name.endswith(tuple(f".{row.stacked[1] if row.kind == 'experts' else row.output}.weight" for row in self.family.parts))

    def is_output_bias(self, name: str) -> bool:
        """Whether this is the name of a bias of an output projection, which only a recovery or the config's flags give."""
        return name.endswith(tuple(f".{row.output}.bias" for row in self.family.parts))

    def rotary_heads(self, name: str, units: list[dict[str, Units]]) -> int | None:
        """How many heads a tensor of this name holds, where rotary embeddings rotate its rows; None for any other tensor."""
        parts, row = name.split("."), self.family.part("attention")
        if len(parts) < 5 or parts[-2] not in row.inputs[:2]:
            return None
        return units[int(parts[2])]["attention"][("heads", "kv_heads")[row.inputs.index(parts[-2])]]


def keep_rows(linear: nn.Linear, rows: torch.Tensor) -> None:
    """Keeps these rows of a Linear, in place, in their order."""
    for name in ("weight", "bias"):
        old = getattr(linear, name)
        if old is not None:
            setattr(linear, name, nn.Parameter(old.data[rows].contiguous(), requires_grad=old.requires_grad))
    linear.out_features = len(rows)


def with_multi_head_attention(model):
    """The same model with each key/value head repeated for every query head that uses it (in place).

    For comparison with implementations that have multi-head attention only; the outputs stay the same.
    """
    adapter = LayerAdapter(model.config)
    for part in adapter.all_parts(model):
        if not isinstance(part, Attention):
            continue
        heads, kv_heads = part.units["heads"], part.units["kv_heads"]
        repeated = torch.arange(kv_heads).repeat_interleave(heads // kv_heads)
        for linear, rows in part.rows({"heads": torch.arange(heads), "kv_heads": repeated}):
            keep_rows(linear, rows)
        part.note_units({"heads": heads, "kv_heads": heads})
    model.config.num_key_value_heads = model.config.num_attention_heads
    return model
