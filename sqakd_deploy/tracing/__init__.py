"""From a person's PyTorch code to a graph whose every operator has one form."""
