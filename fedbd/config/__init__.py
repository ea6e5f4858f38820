"""What may stand in a YAML file: text to plain values, plain values to frozen dataclasses, every mistake at once."""
