"""Result records, their predictions and the statistics over them."""
