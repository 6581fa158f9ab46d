"""Numbers: types of codes, scales, rounding, and the initializers made of them."""
