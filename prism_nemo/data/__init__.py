"""From a mixture of text files to training batches: each stage in its own file.

    mixture.py    what to train on, as YAML: sources, shares of tokens, the retention share
    tokenizer.py  text to token ids; training a small byte-level BPE
    build.py      mixture -> one Megatron IndexedDataset per source and `manifest.json`
    blend.py      manifest -> blended samples -> batches, resumable from one integer
    corpora.py    real general text that every machine with Python already has

Nothing is imported here, so that reading a mixture does not load torch and Megatron-Core.
"""
