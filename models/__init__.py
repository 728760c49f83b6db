"""Models, data, training and reports; run from the checkout, not part of the installed package."""
