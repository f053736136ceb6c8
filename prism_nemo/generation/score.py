"""Log-probabilities of given tokens, with everything that rows begin with alike read once.

Rows become a prefix tree. A node that has more below it than one pass may hold is read by itself; what follows it is
read in passes of many nodes, which attend to what lies before them in one set of buffers (see
`prism_nemo.generation.passes`). Only outputs that something is asked of go through the output layer, each of them once:
with a large vocabulary that product would otherwise take more time than all layers together.

The weights are read in place, in any tensor- and pipeline-parallel layout. A stage hands its pass on and goes on to the
next one, so that all stages work at the same time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from prism_nemo.errors import InputError, PrismError
from prism_nemo.generation.choose import largest
from prism_nemo.generation.decode import Decoder
from prism_nemo.generation.layers import MLP, Attention, Mamba
from prism_nemo.generation.passes import FAMILY, Masks, Pass, plan
from prism_nemo.generation.prefix_tree import Node, ask, build_tree, families, packed, sortable
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.layers.causal_conv import causal_conv
from prism_nemo.models.layers.ssd import ssd_scan

# Tokens of a pass. More make products of weights no faster on a CPU core, and intermediates leave its cache.
_PASS_TOKENS = {"cpu": 1024, "cuda": 8192}
# Logits that are held at a time; in fp32 64 and 512 MB.
_LOGITS = {"cpu": 2**24, "cuda": 2**27}
# Passes that wait to be taken over by the next pipeline stage.
_AHEAD = 2

# A Mamba mixer's window [m, width - 1, channels] and state [m, heads, p, n]; None for other layers.
_Memory = tuple[torch.Tensor, torch.Tensor] | None


@dataclass(frozen=True)
class Row:
    """Tokens, some of which are asked for.

    Attributes:
        tokens: Ids.
        first: Place of the first that is asked for, at least 1; the others follow up to the end.
    """

    tokens: Sequence[int]
    first: int


@dataclass(frozen=True)
class Scored:
    """What the model says to a row.

    Attributes:
        logprobs: Of each token that was asked for, given all before it, in nats.
        greedy: Whether each of them is the likeliest one (of equals, the one of the lowest id).
    """

    logprobs: list[float]
    greedy: bool


def check_rows(rows: Sequence[Row], positions: int, vocab_size: int) -> None:
    """Refuse rows that no model with these sizes can read.

    Args:
        rows: The rows.
        positions: Most tokens that the model reads; the last token of a row is not read.
        vocab_size: Of the model.

    Raises:
        InputError: Naming the row by its place.
    """
    for number, row in enumerate(rows):
        if not 1 <= row.first < len(row.tokens):
            raise InputError(
                f"row {number}: of {len(row.tokens)} tokens those from {row.first} on are asked for; one token has to "
                "come before them, and one has to be asked for"
            )
        if len(row.tokens) - 1 > positions:
            raise InputError(
                f"row {number}: {len(row.tokens) - 1} tokens have to be read, but the model has {positions} positions"
            )
        if not 0 <= min(row.tokens) <= max(row.tokens) < vocab_size:
            raise InputError(f"row {number}: a token outside the model's vocabulary of {vocab_size}")


@torch.inference_mode()
def score_rows(model: LanguageModel, rows: Sequence[Row], pass_tokens: int | None = None) -> list[Scored]:
    """Score rows; every rank of the model-parallel group calls this with the same ones.

    Equal, but for rounding, to a full forward of each row by itself, whatever the other rows are. Softmax over the
    real vocabulary, in fp32, without the rows that tensor parallelism pads it with.

    Args:
        model: This rank's part, in any tensor- and pipeline-parallel layout.
        rows: Some of which may be equal.
        pass_tokens: Most tokens of a pass; by default as many as suit the device.

    Returns:
        In the order of the rows, the same on every rank of the group.

    Raises:
        InputError: For a row that the model cannot read.
        PrismError: If a log-probability is not finite.
    """
    a = model.architecture
    check_rows(rows, a.max_position_embeddings, a.vocab_size)
    if pass_tokens is not None and pass_tokens < 1:
        raise InputError(f"pass_tokens: {pass_tokens} is less than 1")
    return _Run(model, rows, pass_tokens).scored() if rows else []


class _Reader(Decoder):
    """Reads passes.

    Args:
        model: This rank's part.
        longest: Most tokens of a row.
    """

    def __init__(self, model: LanguageModel, longest: int) -> None:
        super().__init__(model)
        a, tp = self.architecture, self._tp_size
        attention = [i for i, layer in enumerate(self.layers) if isinstance(layer, Attention)]
        shape = a.num_query_groups // tp, longest + FAMILY, a.kv_channels
        # Zeros, because what was never written could be NaN. By layer, keys and values [groups, places, d].
        self._columns = {i: (self.like.new_zeros(shape), self.like.new_zeros(shape)) for i in attention}
        self.recurs = any(isinstance(layer, Mamba) for layer in self.layers)
        per_group = a.num_attention_heads // a.num_query_groups
        self.masks = Masks(longest, per_group, a.sliding_window, self.like) if attention else None

    def read(self, group: Pass, memories: list[_Memory]) -> tuple[torch.Tensor | None, list[_Memory]]:
        """Read a pass.

        Args:
            group: The pass.
            memories: Of what comes before it, by layer; empty if nothing does.

        Returns:
            The residual stream [n, h] after the last layer, None where another stage gets it; and by layer the
            memories that nodes of this pass left.
        """
        cos, sin = self._cos_sin(int(group.positions.max()) + 1)
        if cos is not None and sin is not None:
            cos, sin = cos[group.positions], sin[group.positions]
        x, left = self._enter(group.tokens), []
        for i, layer in enumerate(self.layers):
            normed, memory = self._normed(x, layer.norm), None
            if isinstance(layer, Attention):
                inner = _attend(layer, normed, group, self._columns[i], cos, sin)
            elif isinstance(layer, Mamba):
                inner, memory = _mix(layer, normed, group, memories[i] if memories else None)
            elif isinstance(layer, MLP):
                inner = layer.inner(normed)
            else:
                raise NotImplementedError(f"scoring does not know layers of the kind {type(layer).__name__}")
            left.append(memory)
            x = self._add(x, layer, inner)
        if self.last:
            return x, left
        self._leave(x)
        while len(self._sent) > _AHEAD:
            self._sent.pop(0).wait()
        return None, left

    def outputs(self, x: torch.Tensor, group: Pass, wanted: torch.Tensor) -> torch.Tensor:
        """Log-probability of each wanted token, and whether it is the likeliest: [2, q] in fp64.

        Args:
            x: [n, h], from the last layer.
            group: The pass.
            wanted: [q] ids.
        """
        if self.final_norm is None or self.output is None:
            raise RuntimeError("the last stage has no output layer")
        found = torch.empty(2, len(wanted), dtype=torch.float64, device=x.device)
        size = max(1, _LOGITS[x.device.type] // self.output.weight.shape[0])
        for first in range(0, len(group.scored), size):
            logits = self.output(self._normed(x[group.scored[first : first + size]], self.final_norm)).float()
            asked = ((group.outputs >= first) & (group.outputs < first + size)).nonzero().squeeze(-1)
            if self.architecture.logits_scaling != 1.0:
                logits /= self.architecture.logits_scaling
            found[:, asked] = self._look(self._log_softmax(logits), group.outputs[asked] - first, wanted[asked])
        return found

    def _log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """Of this rank's part of the vocabulary [r, v], over the whole of it; minus infinity for padding."""
        rank, rows = self._tp.rank(), logits.shape[-1]
        logits[:, max(0, self.vocab_size - rank * rows) :] = -torch.inf
        if self._tp_size == 1:
            return logits.log_softmax(dim=-1)
        own = logits.logsumexp(dim=-1)
        parts = [torch.empty_like(own) for _ in range(self._tp_size)]
        dist.all_gather(parts, own, group=self._tp)
        return logits - torch.stack(parts).logsumexp(dim=0).unsqueeze(-1)

    def _look(self, scores: torch.Tensor, rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Find wanted tokens [q] in rows [q] of this rank's scores [r, v]; see `outputs`."""
        width = scores.shape[-1]
        offset = width * self._tp.rank()
        best = largest(scores)
        height, best = scores.gather(-1, best.unsqueeze(-1)).squeeze(-1), best + offset
        mine = (wanted >= offset) & (wanted < offset + width)
        own = scores[rows, (wanted - offset).clamp(0, width - 1)].masked_fill(~mine, -torch.inf)
        if self._tp_size > 1:
            top = height.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group=self._tp)
            best = best.masked_fill(height < top, self._tp_size * width)
            dist.all_reduce(best, dist.ReduceOp.MIN, group=self._tp)
            dist.all_reduce(own, dist.ReduceOp.MAX, group=self._tp)
        return torch.stack((own.double(), (best[rows] == wanted).double()))


def _attend(
    layer: Attention,
    x: torch.Tensor,
    group: Pass,
    columns: tuple[torch.Tensor, torch.Tensor],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> torch.Tensor:
    """Normalised [n, h] to the projection's input [n, heads * d]; the columns take the tokens in."""
    qk, v = layer.project(x, cos, sin)
    keys, values = columns
    k, v = qk[:, :, -1].transpose(0, 1), v.transpose(0, 1)
    # The queries of a group become query positions of their shared key/value head: nothing is expanded.
    q = qk[:, :, :-1].transpose(0, 1).contiguous()  # [groups, n, per group, d]
    out = torch.empty_like(q)
    for job in group.jobs:
        own, seen = slice(job.first, job.last), slice(job.start, job.stop)
        keys[:, job.at : job.stop], values[:, job.at : job.stop] = k[:, own], v[:, own]
        out[:, own] = F.scaled_dot_product_attention(
            q[:, own].flatten(1, 2).unsqueeze(0),
            keys[:, seen].unsqueeze(0),
            values[:, seen].unsqueeze(0),
            attn_mask=job.mask,
            scale=layer.scale,
        ).view_as(q[:, own])
    return out.transpose(0, 1).flatten(1)


def _mix(layer: Mamba, x: torch.Tensor, group: Pass, before: _Memory) -> tuple[torch.Tensor, _Memory]:
    """Normalised [n, h] to the projection's input [n, inner], and the memories that nodes of the pass left.

    Padding enters the recurrence with a step of zero, which leaves the state as it is, and nothing reads its output.
    """
    z, xbc, dt = layer.project(x)
    layout, width = layer.mixer.layout, layer.kernel.shape[-1] - 1
    state_shape = layout.local_heads, layout.head_dim, layout.d_state
    windows = xbc.new_zeros(group.memories, width, xbc.shape[-1])
    states = xbc.new_zeros(group.memories, *state_shape, dtype=torch.promote_types(xbc.dtype, torch.float32))
    if before is not None:
        windows[:1], states[:1] = before
    y = torch.empty_like(z)
    for stretch in group.stretches:
        rows = torch.cat((windows[stretch.before], xbc[stretch.places]), dim=1)
        parts = layer.split_mixed(causal_conv(rows, layer.kernel, layer.bias)[:, width:])
        out, state = ssd_scan(
            parts[0],
            dt[stretch.places] * stretch.real,
            layer.A,
            parts[1],
            parts[2],
            layer.D,
            chunk_size=layer.mixer.chunk_size,
            initial_state=states[stretch.before],
        )
        real = stretch.real.squeeze(-1)
        y[stretch.places[real]] = out.flatten(2)[real]
        ends = stretch.lengths[stretch.continued].view(-1, 1, 1) + torch.arange(width, device=x.device).view(1, -1, 1)
        rows = rows[stretch.continued]
        windows[stretch.after] = rows.gather(1, ends.expand(-1, -1, rows.shape[-1]))
        states[stretch.after] = state[stretch.continued].to(states.dtype)
    return layer.mixer.norm(y, z), (windows[-1:], states[-1:])


class _Run:
    """One call of `score_rows`."""

    def __init__(self, model: LanguageModel, rows: Sequence[Row], pass_tokens: int | None) -> None:
        self.rows = rows
        self.reader = _Reader(model, max(len(row.tokens) - 1 for row in rows))
        self.device = self.reader.like.device
        self.limit = pass_tokens or _PASS_TOKENS[self.device.type]
        self.root, ends = build_tree([sortable(row.tokens[:-1]) for row in rows], self.limit)
        self.slots = [0]
        for row, end in zip(rows, ends, strict=True):
            ask(end, row.first - 1, self.slots[-1])
            self.slots.append(self.slots[-1] + len(row.tokens) - row.first)
        wanted = [token for row in rows for token in row.tokens[row.first :]]
        self.wanted = torch.tensor(wanted, device=self.device)
        self.found = torch.full((2, len(wanted)), torch.nan, dtype=torch.float64, device=self.device)

    def scored(self) -> list[Scored]:
        """Read the tree and share out what was found."""
        self._read_all()
        for message in self.reader.take_sent():
            message.wait()
        group = parallel_state.get_model_parallel_group()
        if group.size() > 1:
            # Ranks count tensor-parallel ranks first, then stages: this is the first rank of the last stage.
            source = group.size() - parallel_state.get_tensor_model_parallel_world_size()
            dist.broadcast(self.found, group=group, group_src=source)
        logprobs, greedy = self.found.tolist()
        found = []
        for number, (first, last) in enumerate(zip(self.slots, self.slots[1:], strict=False)):
            own = logprobs[first:last]
            if not all(-torch.inf < logprob <= 0.0 for logprob in own):
                raise PrismError(
                    f"row {number}: the log-probabilities are not finite; the weights have diverged or overflow in "
                    "this precision"
                )
            found.append(Scored(own, all(greedy[first:last])))
        return found

    def _read_all(self) -> None:
        """Depth first, so that the columns before a node always hold what it follows."""
        stack: list[tuple[Node, list[_Memory]]] = [(self.root, [])]
        while stack:
            node, memories = stack.pop()
            if len(node):
                memories = self._read([[node]], memories)
            small = [child for child in node.children if child.size <= self.limit]
            for batch in packed(small, self.limit):
                self._read(list(families(batch, FAMILY)), memories)
            stack += [(child, memories) for child in reversed(node.children) if child.size > self.limit]

    def _read(self, groups: list[list[Node]], memories: list[_Memory]) -> list[_Memory]:
        group = plan(groups, self.reader.masks, self.reader.recurs, self.device)
        x, left = self.reader.read(group, memories)
        if x is not None and group.slots:
            slots = torch.tensor(group.slots, device=self.device)
            self.found[:, slots] = self.reader.outputs(x, group, self.wanted[slots])
        return left
