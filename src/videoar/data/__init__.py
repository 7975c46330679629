"""Videos in and out, and what is trained on."""
