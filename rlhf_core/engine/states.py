"""Hidden states of a decoder over a batch: the one door through which every trainer runs a model.

What `can_pack` goes the packed way (`rlhf_core.engine.packed`), everything else through transformers' own forward. The
same tensors give the same bits, with gradients or without.
Shape suffixes: B = rows, S = prompt and response tokens, R = response tokens, C = R + 1, N = all rows' response
tokens without padding, D = hidden size.
"""

import torch
from torch import Tensor, nn

from rlhf_core.engine.batches import SequenceBatch
from rlhf_core.engine.compute import autocast, own_forward
from rlhf_core.engine.layout import Layout, TokenSelection, layout_of
from rlhf_core.engine.packed import can_pack, packed_states


def hidden_states(body: nn.Module, batch: SequenceBatch) -> Tensor:
    """Last hidden states of a decoder without its output layer, hidden_BSD, by its own forward.

    Padding is masked and not counted. Where responses are all you need, the functions below are faster.
    """
    with own_forward(body, batch.ids_BS.device):
        return body(
            input_ids=batch.ids_BS,
            attention_mask=batch.mask_BS,
            position_ids=batch.position_ids_BS,
            use_cache=False,
        ).last_hidden_state


def response_states(body: nn.Module, batch: SequenceBatch) -> Tensor:
    """Hidden states where responses are predicted and read, states_BCD, C = R + 1.

    Column 0 is the last prompt token, column t the t-th response token: `states[:, :-1]` predict the response,
    `states[:, 1:]` have read it. What stands under padding is finite and means nothing.
    """
    if not can_pack(body):
        return hidden_states(body, batch)[:, batch.prompt_width - 1 :]
    layout = layout_of(batch)
    reading, places_K = layout.reading()
    states_KD = _read(body, batch, layout, reading)
    rows, columns = len(batch.ids_BS), batch.ids_BS.shape[1] - batch.prompt_width + 1
    states_BCD = states_KD.new_zeros(rows * columns, states_KD.shape[1]).index_copy(0, places_K, states_KD)
    return states_BCD.view(rows, columns, -1)


def predicting_states(body: nn.Module, batch: SequenceBatch) -> Tensor:
    """Hidden states that predict the response tokens, states_ND, row after row, without padding."""
    if not can_pack(body):
        before = slice(batch.prompt_width - 1, -1)
        return hidden_states(body, batch)[:, before][batch.mask_BS[:, batch.prompt_width :].bool()]
    layout = layout_of(batch)
    return _read(body, batch, layout, layout.predicting())


def final_states(body: nn.Module, batch: SequenceBatch) -> Tensor:
    """Hidden state of the last token of each row, states_BD: all that a scalar at the end of a response reads."""
    if not can_pack(body):
        last_B = batch.mask_BS[:, batch.prompt_width :].sum(1) + batch.prompt_width - 1
        return hidden_states(body, batch)[torch.arange(len(last_B), device=last_B.device), last_B]
    layout = layout_of(batch)
    return _read(body, batch, layout, layout.final())


def _read(body: nn.Module, batch: SequenceBatch, layout: Layout, reading: TokenSelection) -> Tensor:
    ids_T = batch.ids_BS.flatten().index_select(0, layout.source_T)
    with autocast(ids_T.device):
        states_WD = packed_states(body, ids_T, layout, reading.wanted)
    return states_WD if reading.pick is None else states_WD.index_select(0, reading.pick)
