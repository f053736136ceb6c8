"""From a mixture of text files to training batches: each stage in its own file.

    mixture.py    what to train on: sources, shares of tokens, the retention share; mixture_file.py reads it from YAML
    tokenizer.py  text to token ids; training a small byte-level BPE
    documents.py  files -> documents, in units that processes can share out (parquet.py, hub.py; template.py and
                  expression.py say what of a record is text and which records are kept)
    tokenise.py   a unit -> a part of tokens (part.py); contamination.py and duplicates.py look at the text on the way
    build.py      parts -> one Megatron IndexedDataset per source and `manifest.json`; show.py shows what is in it
    plan.py       manifest -> the order of samples, a pure function (interleave.py: which source; packing.py: which
                  documents together); samples.py reads them; batches.py deals them to ranks; held_out.py: validation
    corpora.py    real general text that every machine with Python already has

Nothing is imported here, so that reading a mixture does not load torch and Megatron-Core.
"""
