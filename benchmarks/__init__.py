"""What measures: each script writes its figures beside the card and the versions that gave them."""
