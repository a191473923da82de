"""From files to batches, in this order: `sources` (documents), `tokenizer`, `token_cache` (ids on disk, written once),
`augmentation` (FIM, boundary splitting), `packing` (rows), `pipeline` (the training loader and its exact position) and
`heldout` (evaluation, bits per byte). `chat` makes ids of conversations.
"""
