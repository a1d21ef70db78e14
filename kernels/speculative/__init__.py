"""Speculative decoding on the device: drafts, the rows that verify them, and what is accepted.

`ngram` proposes drafts, `rows` lays a row and its drafts out as rows that decode one token each,
and `accept` keeps what the model drew itself. A step calls them in this order, with the model's
forward pass and the ordinary sampler between the last two; none of them asks the device anything,
so by the Triton back end all of it is one CUDA graph.

What is accepted is exact without a test of probabilities: the target's own token is drawn at
every drafted position, from the row's own seed and that position, and a draft only saves time
where it equals the token drawn. So tokens do not depend on drafts.

A sequence is known by its slot. `length` int32 [slots]: tokens known of it, its prompt among
them. `limit` int32 [slots]: known tokens at which it ends. `token_ids` int32 [slots, context].
It grows to `limit` tokens, and to context + 1 at most: the one behind the context is drawn by the
last token that fits, and stored nowhere. A slot of 0 tokens, or of as many as it grows to, is
inert: nothing is drafted or sampled for it. A row that pads a batch has such a slot.
"""
