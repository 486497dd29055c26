//! The consistent cut: stop, capture, save, resume; and its inverse, promotion.
