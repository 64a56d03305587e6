"""Losses on many ranks: the tile passes of one device, with shards that travel."""
