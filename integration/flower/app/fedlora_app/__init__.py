"""The app that Flower loads: both halves are imported from the checkout."""
