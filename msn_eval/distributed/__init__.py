"""Jobs of several ranks: how they meet, exchange values, and notice that one of them is lost."""
