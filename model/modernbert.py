"""ModernBERT on packed tokens, with a masked-language-model head.

Architecture of Warner et al. 2024 (arXiv 2412.13663): pre-norm layers without biases, rotary
positions, attention over the whole document in every third layer and over a window elsewhere,
GeGLU with exact erf, a decoder tied to the embedding. There is no dropout anywhere.

Parameters bear the names of transformers' `ModernBertForMaskedLM`, so a state dict goes both ways.

The loss reads masked tokens alone, and the last layer computes no others: its keys and values are
of all tokens, its queries and all that follows of those that are read (in attention, of windows and
short documents, of all). Losses and gradients are what they would be, and most of a layer's work on
seven tokens in ten is saved where 30 % are masked.

Dimensions in the names of tensors: T packed tokens, D hidden size, H heads, M masked positions,
V vocabulary, B rows, S columns of a padded batch, P positions of a rotary table, R pairs of a head.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kernels.embedding import embedding, embedding_reference
from kernels.geglu import geglu_linear, geglu_linear_reference
from kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_reference,
    layer_norm,
    layer_norm_reference,
)
from kernels.linear_cross_entropy import linear_cross_entropy_each
from kernels.unpad import pad, pad_reference, unpad, unpad_reference
from model.attention import (
    Choice,
    Documents,
    LongDocuments,
    Queries,
    attend,
    describe_documents,
)
from model.attention_choice import choose_attention
from model.config import ModernBertConfig, Recompute
from model.initialization import initialize
from model.rotary import RotaryTables, runs_in_triton


def _run(function: Callable[..., Any], again: bool, *inputs: Any) -> Any:
    """`function(*inputs)`; with `again` only the inputs are kept, and the backward calls it too."""
    if not (again and torch.is_grad_enabled()):
        return function(*inputs)
    # Nothing here draws random numbers.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Attention(nn.Module):
    """Multi-head attention within documents, over the whole document or a window of it."""

    def __init__(self, config: ModernBertConfig, layer: int):
        super().__init__()
        self.shape = (3, config.num_attention_heads, config.head_dim)
        self.window = config.window(layer)
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.Wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_TD: Tensor,
        documents: Documents,
        tables: RotaryTables,
        backends: Choice,
        queries: Queries | None,
    ) -> Tensor:
        qkv_T3HD = self.Wqkv(hidden_TD).unflatten(-1, self.shape)
        out = attend(qkv_T3HD, tables, documents, self.window, backends, queries)
        return self.Wo(out.flatten(1))


class GeGluLinear(nn.Linear):
    """Wo(gelu(a) · b) of the product [a | b]; gelu with the exact error function."""

    def forward(self, product_TI2: Tensor) -> Tensor:
        apply = geglu_linear if runs_in_triton(product_TI2) else geglu_linear_reference
        return apply(product_TI2, self.weight)


class Mlp(nn.Module):
    """Wo(gelu(a) · b) with a, b the two halves of Wi(x)."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.Wi = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.Wo = GeGluLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        return self.Wo(self.Wi(hidden_TD))


class Norm(nn.LayerNorm):
    """LayerNorm without bias, alone or together with the residual add before it."""

    def __init__(self, config: ModernBertConfig):
        super().__init__(config.hidden_size, eps=config.norm_eps, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        norm = layer_norm if runs_in_triton(hidden) else layer_norm_reference
        return norm(hidden, self.weight, self.eps)


class AddNorm(Norm):
    """(norm of x + branch, x + branch): what a branch reads, and what runs past it."""

    def forward(self, branch: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        norm = add_layer_norm if runs_in_triton(hidden) else add_layer_norm_reference
        return norm(branch, hidden, self.weight, self.eps)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each sum made by the norm that reads it.

    So a layer is given x and the branch that is yet to be added to it, and hands on the same. The
    first layer has no norm before its attention, and no branch: the embedding has just been
    normalised. Given queries, it hands on these tokens alone, (M, D).
    """

    def __init__(self, config: ModernBertConfig, layer: int):
        super().__init__()
        self.attn_norm = nn.Identity() if layer == 0 else AddNorm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = AddNorm(config)
        self.mlp = Mlp(config)
        self.recompute: Recompute = "none"

    def forward(
        self,
        hidden_TD: Tensor,
        branch_TD: Tensor | None,
        documents: Documents,
        tables: RotaryTables,
        backends: Choice,
        queries: Queries | None = None,
    ) -> tuple[Tensor, Tensor]:
        def whole(hidden_TD: Tensor, branch_TD: Tensor | None) -> tuple[Tensor, Tensor]:
            normed_TD = hidden_TD
            if branch_TD is not None:
                normed_TD, hidden_TD = self.attn_norm(branch_TD, hidden_TD)
            branch = self.attn(normed_TD, documents, tables, backends, queries)
            hidden = hidden_TD if queries is None else queries.take(hidden_TD)
            normed, hidden = self.mlp_norm(branch, hidden)
            return hidden, _run(self.mlp, self.recompute == "mlp", normed)

        result: tuple[Tensor, Tensor] = _run(whole, self.recompute == "layer", hidden_TD, branch_TD)
        return result


class TokenEmbedding(nn.Embedding):
    """Rows of the weight; the padding row gets no gradient from being looked up."""

    def forward(self, input_ids_T: Tensor) -> Tensor:
        look_up = embedding if runs_in_triton(self.weight) else embedding_reference
        return look_up(input_ids_T, self.weight, self.padding_idx)


class Embeddings(nn.Module):
    """Token embeddings, normalised; [PAD]'s row gets no gradient from being looked up."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.tok_embeddings = TokenEmbedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.norm = Norm(config)

    def forward(self, input_ids_T: Tensor) -> Tensor:
        return self.norm(self.tok_embeddings(input_ids_T))


class Encoder(nn.Module):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = AddNorm(config)
        sizes = (config.max_position_embeddings, config.head_dim)
        self.global_rotary = RotaryTables(*sizes, config.global_rope_theta)
        self.local_rotary = RotaryTables(*sizes, config.local_rope_theta)

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        backends: Choice | None,
        queries: Queries | None,
        long: LongDocuments | None,
    ) -> Tensor:
        hidden, branch = self.embeddings(input_ids_T), None
        if backends is None:
            backends = choose_attention(hidden.device, hidden.dtype, self.config.head_dim)
        documents = describe_documents(position_ids_T, cu_seqlens, max_seqlen, backends, long)
        for i, layer in enumerate(self.layers):
            tables = self.global_rotary if self.config.is_global(i) else self.local_rotary
            of_layer = queries if i == len(self.layers) - 1 else None
            hidden, branch = layer(hidden, branch, documents, tables, backends, of_layer)
        normed, _ = self.final_norm(branch, hidden)
        return normed


class Head(nn.Module):
    """norm(gelu(dense(x))), what the decoder reads."""

    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.norm = Norm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(hidden)))


class Decoder(nn.Linear):
    """Logits over the vocabulary or, given labels, the cross-entropy without holding them all.

    The cross-entropy is its sum, an fp32 scalar, and what is known of each label, (2, M) without a
    gradient. It is computed in here so that the weight is used within this module's call alone:
    ZeRO-3 gathers a module's parameters for just that long.
    """

    def forward(  # type: ignore[override]
        self, hidden: Tensor, labels_M: Tensor | None = None, counted: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        if labels_M is None:
            return super().forward(hidden)
        return linear_cross_entropy_each(hidden, self.weight, self.bias, labels_M, counted)


class ModernBertForMaskedLM(nn.Module):
    """ModernBERT with its masked-language-model head, on packed tokens.

    A batch is T tokens of documents laid end to end: `input_ids_T` int64, `position_ids_T` (int32
    or int64, starting at 0 in every document), `cu_seqlens` (N + 1,) int32 with first entry 0 and
    last T (empty documents are fine, padding is a document of its own) and `max_seqlen`, which no
    document exceeds. Where cu_seqlens ends before T, the tokens behind it attend to nothing.

    generator: draws the starting weights (see `model.initialization`); the same seed gives the
    same model in every process. None draws from torch's global generator.
    `attention` may be set to another `model.attention.Choice`; None, the default, means
    `choose_attention`'s choice for the device and dtype at hand.
    """

    def __init__(self, config: ModernBertConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.attention: Choice | None = None
        self.model = Encoder(config)
        self.head = Head(config)
        self.decoder = Decoder(config.hidden_size, config.vocab_size)
        self.decoder.weight = self.model.embeddings.tok_embeddings.weight
        initialize(self, config, generator)

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        masked_indices_M: Tensor,
        labels_M: Tensor,
        counted: int | None = None,
        each: bool = False,
        masked_cu_seqlens: Tensor | None = None,
        long: LongDocuments | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The SUM, an fp32 scalar, of the cross-entropy over the labels that are not −100.

        masked_indices_M: int64 places in 0 … T − 1 to predict; labels_M: int64 ids of what was
        there, −100 for entries that only fill the list up. M may be 0 and every label ignored:
        then the loss is 0 and so are the gradients. counted: how many entries are not filler, where
        all filler comes last; the decoder then skips it. Callers divide by the number of labels of
        the whole step. each: return with it, of each label, (2, M) fp32 without a gradient: its
        cross-entropy, and 1 if no token is likelier; 0 and 0 for filler. masked_cu_seqlens:
        (N + 1,) int32, where masked_indices_M goes through the documents one after another, each
        place once: entries masked_cu_seqlens[n] to masked_cu_seqlens[n + 1] lie in document n,
        filler behind the last. The last layer's attention then skips the other tokens of long
        documents, where it has no window.
        long: see `encode`.
        """
        queries = Queries(masked_indices_M, masked_cu_seqlens)
        hidden_MD = self.encode(input_ids_T, position_ids_T, cu_seqlens, max_seqlen, queries, long)
        loss, each_2M = self.decoder(self.head(hidden_MD), labels_M, counted)
        return (loss, each_2M) if each else loss

    def encode(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        queries: Queries | None = None,
        long: LongDocuments | None = None,
    ) -> Tensor:
        """Hidden states (T, D) after the last norm; given queries, (M, D), of these alone.

        long: where it is given, no document behind the long ones may be longer than
        `model.attention.SHORT_DOCUMENTS`. Layers without a window leave those to a kernel whose
        grid does not go over documents.
        """
        return self.model(
            input_ids_T,
            position_ids_T,
            cu_seqlens,
            max_seqlen,
            self.attention,
            queries,
            long,
        )

    def set_recompute(self, recompute: Recompute) -> None:
        """Say what of every layer the backward computes again.

        none: nothing; mlp: what its MLP makes of the norm before it; layer: all of it. Gradients
        stay the same, to the bit.
        """
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            layer.recompute = recompute

    def set_global_rope_theta(self, theta: float) -> None:
        """Turn positions in global attention by another base, as training does for long texts."""
        self.config = self.model.config = replace(self.config, global_rope_theta=theta)
        self.model.global_rotary.set_theta(theta)

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) hidden states to (…, V) logits."""
        return self.decoder(self.head(hidden))

    def forward_padded(
        self, input_ids_BS: Tensor, attention_mask_BS: Tensor, capacity: int | None = None
    ) -> Tensor:
        """Logits (B, S, V) of a padded batch, computed without its padding; zeros at padding.

        Each row's real tokens must be contiguous. capacity: see `kernels.unpad.unpad`; without it
        the number of tokens is read back from a GPU.
        """
        on_gpu = input_ids_BS.is_cuda
        columns = torch.arange(input_ids_BS.shape[1], device=input_ids_BS.device)
        packing, (input_ids_T, position_ids_T) = (unpad if on_gpu else unpad_reference)(
            attention_mask_BS, [input_ids_BS, columns.expand_as(input_ids_BS)], capacity
        )
        hidden_TD = self.encode(input_ids_T, position_ids_T, packing.cu_seqlens, packing.max_seqlen)
        (logits_BSV,) = (pad if on_gpu else pad_reference)(packing, [self.logits(hidden_TD)])
        return logits_BSV
