"""One module and its adapters: kinds of layers, adapted weights, merged state."""
