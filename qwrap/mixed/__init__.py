"""Mixed precision: what each part of a model loses and costs in each type, and the best choice."""
