"""Losses, advantages, KL and masked statistics: tensors in, tensors out.

Nothing here reads a configuration, logs, moves a device or keeps state. Shape suffixes used by every module:
B = rows (responses), R = response tokens, N = pairs, G = rankings, K = places of a ranking, D = hidden size.
A mask is 1.0 where a token counts and 0.0 elsewhere; whatever stands under a zero, NaN included, changes neither a
value nor a gradient.

One convention for every loss: a function called `..._losses` returns the loss of each item (token, pair, response,
ranking) and no mean, zero under the mask; statistics that come with it are detached, of the same shape and zero
under the same mask. The caller weighs, sums and divides by the total of the whole step,

    loss = (weights_N * losses_N).sum() / total        total = items, or sum of weights, of ALL micro-batches and ranks

so a step cut into micro-batches or shared by processes takes the very step of one batch. Statistics are divided
likewise; a maximum is taken, not summed. What needs a mean before it can be subtracted (whitening, group baselines,
KTO's reference point) takes `across`, a sum over processes such as `World.total`.
"""
