"""Training text, from files to batches; import its modules by name.

    corpus = cache.tokenize_files(["poems/", "more.jsonl.gz"], tokenizer)   # once, then cached
    train, valid = corpus.split(0.01, seed=0)                               # by document
    rows_ = rows.RowDataset(corpus, documents=train, length=1024)           # map-style
    batches.BatchStream(rows_, batch_size=4, seed=0).batch(0)               # 0, 1, 2, ... endless

This module imports nothing, so that the processes that tokenize need not load torch.
"""
