"""Sources of records, tokenizer and chat template, document encoding, packing, mixtures, document boundaries."""
