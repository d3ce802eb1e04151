"""The accuracy study: methods compared in the minutes that a GPU is at hand, from images and weights taken along."""
