"""Stage `sft`: tokenizer and language model from demonstrations."""
