"""From files to the rows of step t: source → tokenizer → packing → batch → loader."""
