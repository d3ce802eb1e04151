"""The accuracy study: methods compared within a time limit, on images and a model of the user's."""
