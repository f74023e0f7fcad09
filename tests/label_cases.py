"""Models with every kind of label, each with its batches and, by explicit loops, the features and labels that belong together."""

from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

transformers.logging.set_verbosity_error()


class Case(NamedTuple):
    model: nn.Module
    head: str  # name of the classifier
    batches: list[Any]
    arguments: dict[str, Any]
    pair: Any  # batch, input of the classifier -> list of (feature vector, class)


def gpt2(vocabulary=7):
    torch.manual_seed(0)
    sizes = {"n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocabulary, **sizes, **dropouts))


def sequences(count=12, longest=9, vocabulary=7, seed=0, left=False):
    """Token sequences of different lengths, padded with a token that is also a word."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (count, longest), generator=generator)
    lengths = torch.randint(2, longest + 1, (count,), generator=generator)
    order = torch.arange(longest).flip(0) if left else torch.arange(longest)
    mask = (order < lengths[:, None]).long()
    return tokens * mask, mask


def causal():
    batches = []
    for seed, longest in ((0, 9), (1, 6), (2, 9)):
        tokens, mask = sequences(longest=longest, seed=seed, left=seed == 2)
        batches.append({"input_ids": tokens, "attention_mask": mask})
    batches.insert(1, {"input_ids": torch.zeros(3, 5, dtype=torch.long), "attention_mask": torch.zeros(3, 5).long()})

    def pair(batch, x):
        found = []
        for i, sequence in enumerate(batch["input_ids"].tolist()):
            real = batch["attention_mask"][i].tolist()
            found += [(x[i, t], sequence[t + 1]) for t in range(len(sequence) - 1) if real[t] and real[t + 1]]
        return found

    return Case(gpt2(), "lm_head", batches, {"target_fn": "next_token"}, pair)


def labeled_causal():
    """Labels as the Trainer of transformers has them: the tokens themselves, -100 at the prompt and at padding."""
    case = causal()
    batches = [
        {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
        for batch in case.batches
    ]
    for batch in batches:
        batch["labels"][:, :2] = -100

    def pair(batch, x):
        found = []
        for i, labels in enumerate(batch["labels"].tolist()):
            real = batch["attention_mask"][i].tolist()
            places = range(len(labels) - 1)
            found += [(x[i, t], labels[t + 1]) for t in places if labels[t + 1] != -100 and real[t] and real[t + 1]]
        return found

    return case._replace(batches=batches, pair=pair)


def token_classifier():
    torch.manual_seed(1)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=7, num_labels=4, max_position_embeddings=16, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    batches = []
    for seed, longest in ((0, 9), (1, 6), (2, 9)):
        tokens, mask = sequences(longest=longest, seed=seed)
        labels = ((3 * tokens + torch.arange(longest)) % 4).masked_fill(mask == 0, -100)
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return Case(transformers.BertForTokenClassification(config), "classifier", batches, {}, by_position)


def by_position(batch, x):
    labels = batch["labels"]
    return [
        (x[i, t], int(labels[i, t])) for i in range(len(labels)) for t in range(labels.shape[1]) if labels[i, t] != -100
    ]


def segmentation():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    batches = [(torch.randn(n, 3, 5, 7), torch.randint(4, (n, 5, 7)).byte()) for n in (6, 4)]
    for _, labels in batches:
        labels[:, 0] = 255
        labels[0, :, 3] = 255

    def pair(batch, x):
        labels = batch[1]
        places = (labels != 255).nonzero().tolist()
        return [(x[i, :, a, b], int(labels[i, a, b])) for i, a, b in places]

    return Case(model, "2", batches, {"ignore_index": 255}, pair)


def one_logit():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1))
    batches = [(torch.randn(n, 5), (torch.arange(n) % 3 == 0).float()[:, None]) for n in (9, 7)]
    return Case(model, "2", batches, {}, lambda batch, x: [(x[i], int(y)) for i, y in enumerate(batch[1][:, 0])])


def one_hot():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    batches = [(torch.randn(n, 5), nn.functional.one_hot(torch.arange(n) % 3, 3).float()) for n in (9, 7)]
    return Case(
        model, "2", batches, {}, lambda batch, x: [(x[i], row.tolist().index(1)) for i, row in enumerate(batch[1])]
    )


def cls_token():
    torch.manual_seed(5)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)
    batches = [{"pixel_values": torch.randn(n, 3, 8, 8), "labels": torch.arange(n) % 3} for n in (9, 8)]
    arguments = {"pool": "first", "layers": ["*vit.layernorm"]}
    model = transformers.ViTForImageClassification(config)
    return Case(
        model, "classifier", batches, arguments, lambda batch, x: list(zip(x, batch["labels"].tolist(), strict=True))
    )


CASES = {
    case.__name__: case
    for case in (causal, labeled_causal, token_classifier, segmentation, one_logit, one_hot, cls_token)
}


def features_and_labels(case):
    """All feature vectors that the classifier receives in eval mode, and their classes, in float64."""
    found, seen = [], []
    module = case.model.get_submodule(case.head)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    case.model.eval()
    with torch.no_grad():
        for batch in case.batches:
            inputs = {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, dict) else {}
            case.model(**inputs) if inputs else case.model(batch[0])
            found += case.pair(batch, seen.pop())
    handle.remove()
    return np.stack([row.numpy() for row, _ in found]), np.array([label for _, label in found])


def loader_of(batches):
    """Batches as they are, in a loader that Lightning takes."""
    return DataLoader(batches, batch_size=None)


class Frozen(LightningModule):
    """Trains a model with a learning rate of zero, so that all modes see the same weights."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def training_step(self, batch, batch_idx):
        if isinstance(batch, dict):
            output = self.model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        else:
            output = self.model(batch[0])
        return output.float().square().mean()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)
