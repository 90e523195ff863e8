"""The parts of models. They take numbers and arrays; they know no family, no file, no checkpoint's names."""
