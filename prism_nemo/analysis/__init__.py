"""What a training stage did to a model: to its weights (`weights`) and to its representations (`cka`)."""
