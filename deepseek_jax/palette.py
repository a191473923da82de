"""The colours of every drawing: Okabe and Ito's set, which people with any kind of colour blindness can tell apart.

Okabe, Ito: "Color Universal Design" (2008). A curve keeps its colour over all panels of a drawing.
"""

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, YELLOW, GRAY, BLACK = "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F", "#000000"

SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION)  # of curves that have no meaning of their own, in this order
BELOW_TO_ABOVE = "RdBu_r"  # a map from below (blue) through even (white) to above (red), safe for the colour-blind
