"""Rank texts by their probability under the model, and show the least expected token of each.

python examples/score.py out.safetensors 床前明月光，疑是地上霜。 床前明月光，疑是地下霜。
"""

from __future__ import annotations

import argparse

from gpt2ml_torch import Generator


def main() -> None:
    parser = argparse.ArgumentParser(description="Rank texts by their perplexity.")
    parser.add_argument("model", help="a .safetensors file made by the converter")
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    arguments = parser.parse_args()

    generator = Generator.from_pretrained(arguments.model, quantize=None, compile=False)
    scores = generator.score(arguments.texts)
    for score in sorted(scores, key=lambda score: score.perplexity):
        print(f"perplexity {score.perplexity:8.2f}  {score.text}")
        # The first token is not predicted, so it has no log-probability.
        tokens = [generator.tokenizer.id_to_token(id_) for id_ in score.token_ids[1:]]
        worst = min(zip(score.token_logprobs, tokens, strict=True), default=None)
        if worst is not None:
            print(f"  least expected: {worst[1]} ({worst[0]:.2f} nats)")


if __name__ == "__main__":
    main()
