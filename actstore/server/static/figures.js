// All figures by name: what the page and the report draw.

import { cosineDensity, agreement, layerPairs, pairMap, tokenMatrix } from "./fig-similarity.js";
import { dimensionProfiles, dimensionScatter, intrinsicProfile, spectrum } from "./fig-dimensions.js";
import { histograms, neuronScatter } from "./fig-distributions.js";
import { informationScatter, informationSweep, labelInformation, layerScatter, pairDistributions } from "./fig-information.js";
import { layerMatrix } from "./fig-layers.js";
import { pairProfile, profiles } from "./fig-profiles.js";

/** Each takes (result, options, {width, dark}) and gives Plotly's {data, layout}. */
export const FIGURES = {
  agreement, cosineDensity, dimensionProfiles, dimensionScatter, histograms, informationScatter, informationSweep,
  intrinsicProfile, labelInformation, layerMatrix, layerPairs, layerScatter, neuronScatter, pairDistributions, pairMap, pairProfile,
  profiles, spectrum, tokenMatrix,
};
