"""Many heads: what a sweep file asks for, parallel training, honest choice, the leakage guard."""
