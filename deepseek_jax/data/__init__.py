"""From files to batches, in this order: `sources` (documents), `split` (which are trained on), `tokenizer`, `bpe` and
`run_tokenizer` (text to ids), `token_cache` and `token_files` (ids on disk, written once), `augmentation` (FIM,
boundary splitting), `examples` (ids and their weights), `packing` (rows), `pipeline` (the training loader and its exact
position) and `heldout` (evaluation, bits per byte). `chat` makes ids of conversations.
"""
