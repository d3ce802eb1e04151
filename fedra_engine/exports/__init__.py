"""What a run gives to others: the adapter in PEFT's format, and a merged model, each with a card.

May import the packages up to the round loop; the callbacks and the commands call it.
"""
