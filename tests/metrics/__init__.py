"""What is measured and how it is written down."""
