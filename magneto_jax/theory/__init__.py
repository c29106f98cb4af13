"""What a recipe is and what it predicts; standard library and NumPy only."""
