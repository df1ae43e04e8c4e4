"""Serving: one model, many requests at once, from Python or over HTTP.

    with Scheduler(generator) as scheduler:
        handle = scheduler.submit("今天天气不错", max_new_tokens=64)
        for piece in handle:
            print(piece.text, end="")

`gpt2ml serve` puts OpenAI's completions endpoint and a page on top of it (`app`, which needs the
extra `serve`).
"""

from gpt2ml_torch.serving.scheduler import Handle, Piece, QueueFull, Scheduler

__all__ = ["Handle", "Piece", "QueueFull", "Scheduler"]
