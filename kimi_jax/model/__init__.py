"""The model's mathematics, on one device. `params` is the table of weights, `transformer` the whole."""
