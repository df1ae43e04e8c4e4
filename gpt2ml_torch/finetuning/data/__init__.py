"""Training text, from files to batches.

corpus = tokenize_files(["poems/", "more.jsonl.gz"], tokenizer)     # once; then from the cache
train, valid = corpus.split(0.01, seed=0)                           # by document
rows = RowDataset(corpus, documents=train, length=1024)             # map-style
for batch in BatchStream(rows, batch_size=4, seed=0): ...           # endless, resumable
"""

from gpt2ml_torch.finetuning.data.cache import default_cache_dir, tokenize_files
from gpt2ml_torch.finetuning.data.corpus import Corpus
from gpt2ml_torch.finetuning.data.reading import SEPARATORS, Piece, Separator, read_pieces
from gpt2ml_torch.finetuning.data.rows import RowDataset, Rows, collate, next_token_rows
from gpt2ml_torch.finetuning.data.sources import Source, find_sources
from gpt2ml_torch.finetuning.data.stream import BatchStream, evaluation_batches
from gpt2ml_torch.finetuning.data.summary import Summary, summarize

__all__ = [
    "SEPARATORS",
    "BatchStream",
    "Corpus",
    "Piece",
    "RowDataset",
    "Rows",
    "Separator",
    "Source",
    "Summary",
    "collate",
    "default_cache_dir",
    "evaluation_batches",
    "find_sources",
    "next_token_rows",
    "read_pieces",
    "summarize",
    "tokenize_files",
]
