"""Bytes that one forward and backward pass over packed tokens holds.

Counted from what the layers save for the backward pass (`tuneloop.models.{lora,fused,grouped_attention,logprobs}`): an
operation that needs no input again saves none. A test compares the count with what autograd really saves.

Legend: T packed tokens, S scored tokens, D hidden size, Q and K widths of queries and keys, I inner size, V vocabulary.
"""

from dataclasses import dataclass

from tuneloop.plan.inputs import PackedWork, PlanInputs

LOGITS_ELEMENTS = 1 << 22  # held at once in sampling, and where the head is trained
HEAD_ROWS, HEAD_BLOCK = 512, 2048  # rows and tokens at once of a frozen head; see `tuneloop.models.logprobs`
SCORE_ELEMENTS = 1 << 20  # of attention, held at once; see `tuneloop.models.grouped_attention`
FP32 = 4

_INPUT_OF = {  # what each projection multiplies: saved once, for all of them that are trained
    "q_proj": "attention_input", "k_proj": "attention_input", "v_proj": "attention_input",
    "gate_proj": "mlp_input", "up_proj": "mlp_input", "down_proj": "activated",
}  # fmt: skip


@dataclass(frozen=True)
class Activations:
    """Bytes of one pass.

    Attributes:
        saved: for the backward pass, over all layers.
        head: of the output head: the gradient's directions, and the rows that it reads.
        scratch: of the largest operation.
        largest: of the largest single tensor that is saved.
    """

    saved: int
    head: int
    scratch: int
    largest: int

    @property
    def total(self) -> int:
        """All that is held at the same time."""
        return self.saved + self.head + self.scratch


def layer_bytes(inputs: PlanInputs, full: bool, dropout: float = 0.0) -> int:
    """Bytes a token that one layer saves for the backward pass.

    Args:
        full: whether the weights themselves are trained.
        dropout: of the adapter.
    """
    shape, width = inputs.shape, inputs.width
    inner, query, key = shape.intermediate, shape.query_width, shape.kv_width
    always = 2 * query + 2 * key + 2 * inner  # attention: rotated queries and keys, values, output; the gate and up
    if shape.head_norms:
        always += query + key
    if full:
        # transformers' own norms: fp32 copies of their inputs (in fp32 the inputs themselves), and what they normalised
        norms = 2 * shape.hidden * (FP32 + width)
        return norms + (always + 2 * shape.hidden + inner) * width
    targets = inputs.targets
    ranks = sum(rank for _, _, rank in targets.values()) / shape.layers
    sides = {"attention_input": shape.hidden, "mlp_input": shape.hidden, "activated": inner}
    leaves = {name.rpartition(".")[2] for name in targets}
    needed = {place for leaf, place in _INPUT_OF.items() if leaf in leaves}
    kept = 2 * shape.hidden + always + sum(sides[place] for place in needed) + ranks  # the norms keep their inputs
    total = kept * width + (2 + shape.heads) * FP32  # the norms' scales, and the scores' normalisers
    if dropout:  # a copy and a mask for each module
        total += sum(into for _, into, _ in targets.values()) / shape.layers * (width + 1)
    return int(total)


def training_pass(
    inputs: PlanInputs, work: PackedWork, *, full: bool, checkpointing: bool, dropout: float = 0.0, on_cpu: bool
) -> Activations:
    """What an update's forward and backward pass over `work` holds."""
    shape, width, tokens = inputs.shape, inputs.width, work.tokens
    a_layer = layer_bytes(inputs, full, dropout) * tokens
    stream = tokens * shape.hidden * width  # the input of a layer
    saved = shape.layers * stream + a_layer if checkpointing else shape.layers * a_layer
    head = 2 * work.scored * shape.hidden * width
    return Activations(
        saved=saved,
        head=head,
        scratch=max(
            _attention_scratch(inputs, tokens),
            _mlp_scratch(inputs, tokens, on_cpu),
            logits_scratch(inputs, work.scored)
            if full
            else _head_scratch(inputs, work.scored, keeps=True, on_cpu=on_cpu),
        ),
        largest=tokens * max(shape.intermediate, shape.hidden) * width,
    )


def scoring_pass(inputs: PlanInputs, tokens: int, on_cpu: bool) -> int:
    """Bytes of a forward pass over `tokens` without gradients: one layer's, and the head's."""
    shape = inputs.shape
    a_layer = tokens * (4 * shape.hidden + 2 * shape.query_width + 2 * shape.kv_width + 3 * shape.intermediate)
    rows = tokens * shape.hidden * (0 if on_cpu else FP32)  # a norm's fp32 copy
    head = _head_scratch(inputs, tokens, keeps=False, on_cpu=on_cpu)
    return a_layer * inputs.width + rows + max(_attention_scratch(inputs, tokens), head)


def _attention_scratch(inputs: PlanInputs, tokens: int) -> int:
    """A few fp32 copies of a piece of scores, and queries, outputs and their gradients in an order of its own."""
    return 5 * FP32 * SCORE_ELEMENTS + 4 * tokens * inputs.shape.query_width * inputs.width


def _mlp_scratch(inputs: PlanInputs, tokens: int, on_cpu: bool) -> int:
    """Gradients of the gated activation; on a GPU with fp32 copies of all rows."""
    inner, width = inputs.shape.intermediate, inputs.width
    return tokens * inner * (3 * width if on_cpu else 3 * width + 4 * FP32)


def _head_scratch(inputs: PlanInputs, scored: int, *, keeps: bool, on_cpu: bool) -> int:
    """A frozen head's probabilities, kept for the gradient's directions, and a block of logits in its three forms."""
    vocabulary = inputs.shape.vocabulary
    rows, block = min(scored, HEAD_ROWS), min(vocabulary, HEAD_BLOCK) if on_cpu else vocabulary
    kept = rows * vocabulary * inputs.width if keeps else 0
    return kept + rows * block * (2 * FP32 + inputs.width)


def logits_scratch(inputs: PlanInputs, scored: int) -> int:
    """A chunk of logits: in the model's dtype, in fp32, its exponentials, and the residual in the model's dtype."""
    rows = min(scored, max(1, LOGITS_ELEMENTS // inputs.shape.vocabulary))
    return rows * inputs.shape.vocabulary * (2 * FP32 + 2 * inputs.width)
