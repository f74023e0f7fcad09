"""A small GPT on real text: neural collapse over the training, and which tokens collapse first.

    python examples/language_model.py                    # the help texts of Python itself; a few minutes on two cores
    python examples/language_model.py --text novel.txt   # a text file of your own
    python examples/language_model.py --help             # every option

To predict the next token is to classify: every position of the text is a sample, and the token that follows is its class.
`NeuralCollapseCallback` takes the labels (B, T) as they are. The file reads from top to bottom: the text and its tokens, the
model, the run. What is said about single tokens, the tables and the figures are in `language_model_report.py`. Files go to
``--out``. See docs/language_model.md.
"""

import re
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import torch
from language_model_report import TokenStatistics, report
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_nc import NeuralCollapseCallback, log_spaced, measure

METRICS = (
    "nc1",
    "nc1_cdnv",
    "nc2_etf_centered",
    "nc2_equinorm",
    "nc2_equiangular",
    "nc3_centered",
    "nc3_cosine",
)

# ------------------------------------------------------------------------------------------------ the text and its tokens


def read_text(path: Path | None) -> str:
    """The paragraphs of a text file, or of Python's help texts, a line each.

    Each paragraph is kept once, because the help texts repeat some. Line breaks and runs of spaces become one space, and rules
    of dashes or asterisks are dropped: they are layout.
    """
    text = "\n\n".join(topics.values()) if path is None else path.read_text(encoding="utf-8")
    text = re.sub(r"[-=*~+^]{3,}", "", text)
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return "\n".join(dict.fromkeys(filter(None, paragraphs)))


def tokenize(text: str, size: int) -> list[str]:
    """The text as tokens: characters, merged pair by pair, the most frequent pair first, up to ``size`` different tokens.

    A token never reaches over the end of a word. A space belongs to the word that follows.
    """
    pieces = re.findall(r" ?\w+| ?[^\w\s]+|\s", text)
    frequency, known = Counter(pieces), set(text)
    if size < len(known):
        raise ValueError(f"the text has {len(known)} different characters; pass --vocabulary {len(known)} or more")
    spelling = {piece: list(piece) for piece in frequency}
    pairs: Counter[tuple[str, str]] = Counter()

    def count(piece: str, sign: int) -> None:
        for pair in pairwise(spelling[piece]):
            pairs[pair] += sign * frequency[piece]

    for piece in spelling:
        count(piece, 1)
    while len(known) < size and pairs.total():
        left, right = max(pairs, key=pairs.__getitem__)
        known.add(left + right)
        for piece in (piece for piece in spelling if left + right in piece):
            count(piece, -1)
            spelling[piece] = merge(spelling[piece], left, right)
            count(piece, 1)
    return [token for piece in pieces for token in spelling[piece]]


def merge(tokens: list[str], left: str, right: str) -> list[str]:
    """Join every ``left`` with a ``right`` that follows it."""
    merged = tokens[:1]
    for token in tokens[1:]:
        if merged[-1] == left and token == right:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def blocks(tokens: Tensor, context: int) -> TensorDataset:
    """Inputs and labels, both (B, T): blocks of T tokens, and for each position the token that follows it."""
    if (rows := (len(tokens) - 1) // context) < 1:
        raise ValueError(
            f"{len(tokens)} tokens are too few for a block of {context}; pass a longer --text or a smaller --context"
        )
    inputs, labels = tokens[: rows * context], tokens[1 : rows * context + 1]
    return TensorDataset(inputs.view(rows, context), labels.view(rows, context))


# ------------------------------------------------------------------------------------------------------------- the model


class Block(nn.Module):
    """Causal self-attention and a multilayer perceptron, each behind a LayerNorm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        parts = self.query_key_value(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.project(attention)
        return x + self.perceptron(self.norm2(x))


class GPT(LightningModule):
    """A decoder-only transformer: ``layers`` blocks of ``width`` features; the features are the input of ``head``."""

    def __init__(self, classes: int, args: Namespace) -> None:
        super().__init__()
        self.lr, self.weight_decay = args.lr, args.weight_decay
        self.token, self.position = nn.Embedding(classes, args.width), nn.Embedding(args.context, args.width)
        self.blocks = nn.Sequential(*[Block(args.width, args.heads) for _ in range(args.layers)])
        self.norm, self.head = nn.LayerNorm(args.width), nn.Linear(args.width, classes, bias=False)
        for weight in (parameter for parameter in self.parameters() if parameter.dim() == 2):
            nn.init.normal_(weight, std=0.02)

    def features(self, tokens: Tensor) -> Tensor:
        """(B, T) tokens to (B, T, d)."""
        return self.norm(self.blocks(self.token(tokens) + self.position.weight[: tokens.shape[1]]))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, K) of the token that follows each of the tokens (B, T)."""
        return self.head(self.features(tokens))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The cross-entropy of the next token."""
        tokens, following = batch
        loss = F.cross_entropy(self(tokens).flatten(0, 1), following.flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Cross-entropy and accuracy on held-out text."""
        tokens, following = batch
        logits = self(tokens)
        accuracy = (logits.argmax(dim=-1) == following).float().mean()
        loss = F.cross_entropy(logits.flatten(0, 1), following.flatten())
        self.log_dict({"val_loss": loss, "val_accuracy": accuracy}, prog_bar=True, batch_size=len(tokens))

    def configure_optimizers(self) -> dict:
        """AdamW; the learning rate rises for a twentieth of the steps, then falls as a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.95), weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.05)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


# --------------------------------------------------------------------------------------------------------------- the run


def parse(arguments: Sequence[str] | None) -> Namespace:
    """The command line."""
    parser = ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--text", type=Path, help="a UTF-8 text file; None: the help texts of Python (pydoc_data.topics)"
    )
    parser.add_argument("--tokens", type=int, help="use only so many tokens of the text; None: all")
    parser.add_argument("--vocabulary", type=int, default=1000, help="K, the number of different tokens")
    parser.add_argument("--context", type=int, default=64, help="T, the number of tokens that the model sees")
    parser.add_argument("--width", type=int, default=128, help="d, the number of features")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks")
    parser.add_argument("--heads", type=int, default=4, help="attention heads of a block")
    parser.add_argument("--epochs", type=int, default=25, help="passes over the text")
    parser.add_argument("--batch-size", type=int, default=16, help="blocks of --context tokens in a step")
    parser.add_argument("--lr", type=float, default=4e-3, help="largest learning rate")
    parser.add_argument("--weight-decay", type=float, default=1.0, help="of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the blocks")
    parser.add_argument("--out", type=Path, default=Path("results/language_model"), help="directory of the files")
    args = parser.parse_args(arguments)
    if args.width % args.heads:
        parser.error(f"--width must be a multiple of --heads, got {args.width} and {args.heads}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, and write the tables and figures."""
    args = parse(arguments)
    tokens = tokenize(read_text(args.text), args.vocabulary)[: args.tokens]
    vocabulary = [token for token, _ in Counter(tokens).most_common()]  # class 0 is the most frequent token
    number = {token: index for index, token in enumerate(vocabulary)}
    numbers = torch.tensor([number[token] for token in tokens])
    held_out = len(numbers) // 10
    train, validation = blocks(numbers[:-held_out], args.context), blocks(numbers[-held_out:], args.context)
    print(f"{len(tokens):,} tokens, {len(vocabulary)} different; the last {held_out:,} are held out")

    seed_everything(args.seed, verbose=False)
    model = GPT(len(vocabulary), args)
    collapse = NeuralCollapseCallback(metrics=METRICS, stages=("train", "validate"), every_n_epochs=log_spaced(6))
    statistics = TokenStatistics(vocabulary, train, validation, collapse.should_measure)
    trainer = Trainer(
        max_epochs=args.epochs,
        gradient_clip_val=1.0,
        callbacks=[statistics, collapse],
        logger=False,
        enable_checkpointing=False,
    )
    warnings.filterwarnings("ignore", "no sample of")  # rare tokens are missing from one of the two texts
    untrained = {"step": 0}
    for stage, data in (("", train), ("val/", validation)):
        values = measure(model, DataLoader(data, 64), metrics=METRICS)
        untrained |= {f"nc/{stage}{name}": value for name, value in values.items()}
    trainer.fit(model, DataLoader(train, args.batch_size, shuffle=True), DataLoader(validation, args.batch_size))
    args.out.mkdir(parents=True, exist_ok=True)
    report(statistics, [untrained, *collapse.history], args.width, args.out)


if __name__ == "__main__":
    main()
