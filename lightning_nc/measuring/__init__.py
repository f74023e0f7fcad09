"""How a number comes about: from a model and a dataloader to values, without any Trainer."""
