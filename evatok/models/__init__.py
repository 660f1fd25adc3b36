"""Networks: tokenizer, quantizers, router, generator, discriminators and frozen teachers."""
