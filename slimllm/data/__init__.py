"""Texts to calibrate and to measure on."""
