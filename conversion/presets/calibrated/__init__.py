"""The preset `calibrated`: closed form from statistics of text, then layer-local refinement."""
