// Package country names countries in English.
package country

import (
	"golang.org/x/text/language"
	"golang.org/x/text/language/display"
)

var regions = display.English.Regions()

// Name is "Netherlands" for "NL" (ISO 3166-1 alpha-2), the code itself if it is
// unknown.
func Name(code string) string {
	region, err := language.ParseRegion(code)
	if err != nil || !region.IsCountry() {
		return code
	}
	if name := regions.Name(region); name != "" {
		return name
	}
	return code
}

// InSentence is the name with the article that English gives it: "the Netherlands".
func InSentence(code string) string {
	switch code {
	case "AE", "BS", "CD", "CF", "DO", "FK", "FO", "GB", "GM", "KM", "KY", "MH", "MV", "NL", "PH", "SB", "SC", "TC", "US", "VA", "VG", "VI":
		return "the " + Name(code)
	}
	return Name(code)
}
