"""The parts that models are made of. They take numbers and arrays; they know no family, no file and no checkpoint's
names."""
